"""Checkpoints that DeepSpeed writes without ZeRO (stage 0): whole tensors, but an optimizer that does not name them.

torch's optimizers number their parameters. Names are known where the optimizer was given them (`param_names`), or where
it has one group of all parameters, which then come in the model's order. Otherwise guessing could give a parameter the
moments of another of the same shape, so only the weights are read, and that is said.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sharding.engine_state import MOMENTS
from tools.convert.deepspeed_files import Model
from tools.convert.held import Held, Tensors
from tools.convert.mapped import Mapped

Said = Callable[[str], None]
REMEDY = "save at ZeRO stage 1 or later, or give the optimizer model.named_parameters()"


def read(model: Model, say: Said) -> Held:
    """The contents of mp_rank_00_model_states.pt; of bf16 training the fp32 masters, where these have names."""
    buffers, tied = set(model.common["buffer_names"]), model.tied
    module = {name: value for name, value in model.common["module"].items() if name not in tied}
    optimizer = model.common["optimizer"] or {"state": {}, "param_groups": []}
    masters = optimizer.get("fp32_groups")  # of bf16 training
    adam = optimizer.get("optimizer_state_dict", optimizer)
    names = names_of(adam["param_groups"], {name: value for name, value in module.items() if name not in buffers})
    states = {name: adam["state"].get(number, {}) for number, name in (names or {}).items()}
    if masters is not None and names is not None:
        module.update(zip(names.values(), [master for group in masters for master in group], strict=True))
    if names is None:
        lost = (
            "the optimizer's state" if masters is None else "the optimizer's state and fp32 masters (weights are bf16)"
        )
        say(f"{lost} cannot be told which parameter each part is of and is left out: {REMEDY}")
    steps = {int(state["step"]) for state in states.values() if set(state) == {"step", *MOMENTS}}
    whole = len(steps) == 1 and all(set(state) == {"step", *MOMENTS} for state in states.values())
    if states and not whole:
        say("the optimizer's state is left out: it is not AdamW's, or its parts have been updated unequally often")
    moments = {f"{which}.{name}": state[which] for which in MOMENTS for name, state in states.items()} if whole else {}
    state: dict[str, Any] = {**model.state(say), "tied": tied, "zero_stage": 0, "adam_step": max(steps) if whole else 0}
    if names is not None:
        state["frozen"] = [name for name in module if name not in buffers.union(states)]
    return Held(tensors(module), tensors(moments), state)


def names_of(groups: list[dict[str, Any]], parameters: dict[str, Tensor]) -> dict[int, str] | None:
    """Name of each number in an optimizer's groups; None where it cannot be told."""
    if groups and all("param_names" in group for group in groups):
        known = {
            number: name for group in groups for number, name in zip(group["params"], group["param_names"], strict=True)
        }
        return known if set(known.values()) <= parameters.keys() else None
    if len(groups) == 1 and len(groups[0]["params"]) == len(parameters):
        return dict(zip(groups[0]["params"], parameters, strict=True))
    return None


def tensors(values: dict[str, Tensor]) -> Tensors:
    """Tensors that are mapped already."""
    shapes = {name: list(value.shape) for name, value in values.items()}
    mapped = Mapped()
    dtypes = {name: value.dtype for name, value in values.items()}
    return Tensors(shapes, dtypes, lambda name: mapped.joined([values[name]], values[name].shape))
