"""What the ranks of the tests of silent failures do: tiny models in DeepSpeed's engine, beside a float64 loop."""

from __future__ import annotations

import copy
import logging
from argparse import Namespace
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from torch import Tensor, nn

from dist_train.run_state import check_bases
from sharding import checkpoint
from sharding.agreement import Agreement
from sharding.collectives import gather_objects
from sharding.engine_state import master
from sharding.errors import UserError, UserErrors
from sharding.portable import Portable
from sharding.zero import ZeroSettings, build_engine
from tests.saved import save

RATE = 0.1  # learning rate of SGD
ROWS, WIDTH = 4, 8

# Passes of a micro-step: the layers each runs through, one after another. Steps → micro-steps → ranks → passes.
Plan = list[list[tuple[list[str], ...]]]
WITH_B, WITH_C = ["stem b head"], ["stem c head"]
PLAIN_FIRST, PLAIN_LAST = ["stem head", "b stem head"], ["b stem head", "stem head"]
PLANS: dict[str, Plan] = {
    "agreeing": [[(WITH_B + WITH_C, WITH_B + WITH_C)]] * 3,
    "other branches": [[(WITH_B, WITH_C)]] * 3,
    "swapped passes": [[(PLAIN_FIRST, PLAIN_LAST)]] * 3,
    "skipped branch": [[(WITH_B, ["stem head"])]] * 3,
    "other gradients": [[(["stem b head", "detached stem c head"], ["detached stem b head", "stem c head"])]] * 3,
    "unused later": [[(WITH_B + WITH_C, WITH_B + WITH_C)], [(WITH_C, WITH_C)], [(WITH_C, WITH_C)]],
    "unused in a first micro-step": [
        [(WITH_B + WITH_C, WITH_B + WITH_C)] * 2,
        [(WITH_C, WITH_C), (WITH_B + WITH_C, WITH_B + WITH_C)],
    ],
}


class Layers(nn.Module):
    """Linear layers of one size; the caller says which run, in which order."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.b, self.c, self.head = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, passes: Sequence[str]) -> Tensor:
        """Sum of the passes' losses; `detached` in front of a pass cuts it off from the gradient."""
        total = x.new_zeros(())
        for names in passes:
            hidden, words = x, names.split()
            for name in words[words[0] == "detached" :]:
                hidden = getattr(self, name)(hidden)
            loss = hidden.square().mean()
            total = total + (loss.detach() if words[0] == "detached" else loss)
        return total


def numbers(seed: int, *place: int) -> Tensor:
    """Input [ROWS, WIDTH] of a place such as (step, micro-step, rank)."""
    return torch.from_numpy(np.random.default_rng([seed, *place]).normal(size=(ROWS, WIDTH)).astype(np.float32))


def hook_count(module: nn.Module) -> int:
    """Hooks of the two kinds the checks use."""
    forward = sum(len(part._forward_pre_hooks) for part in module.modules())
    return forward + sum(len(parameter._post_accumulate_grad_hooks or ()) for parameter in module.parameters())


def train(seed: int, plan: Plan, stage: int, *, checked: bool) -> dict[str, Any]:
    """Runs a plan in DeepSpeed's engine with SGD.

    Returns:
        losses of each finished step (all micro-steps and ranks) and how far each parameter moved in it; the message
        each rank stopped with; whether weights changed in the step it stopped in; hooks before and after.
    """
    torch.manual_seed(seed)
    accumulation, rank = len(plan[0]), dist.get_rank()
    model = Layers()
    engine = build_engine(
        model,
        torch.optim.SGD(model.parameters(), lr=RATE),
        ZeroSettings(stage=stage, persistence_threshold=0),
        micro_batch=ROWS,
        accumulation=accumulation,
        clip_norm=0.0,
        bf16=False,
    )

    def weights() -> dict[str, Tensor]:
        return {name: master(engine, parameter).clone() for name, parameter in engine.module.named_parameters()}

    agreement = Agreement(engine.module, until=len(plan) if checked else 0)
    hooks = hook_count(engine.module)
    before, losses, moved, message = weights(), [], [], None
    try:
        for step, micros in enumerate(plan):
            row = []
            for micro, passes in enumerate(micros):
                with agreement.forward(step):
                    loss = engine(numbers(seed, step, micro, rank), passes[rank])
                with agreement.backward(step):
                    engine.backward(loss)
                row.append(loss.item())
                engine.step()
            losses.append(gather_objects(row))
            after = weights()
            moved.append({name: (after[name] - before[name]).tolist() for name in after})
            before = after
    except UserError as error:
        message = str(error)
    return {
        "losses": losses,
        "moved": moved,
        "messages": gather_objects(message),
        "changed": any(not torch.equal(value, before[name]) for name, value in weights().items()),
        "hooks": [hooks, hook_count(engine.module)],
    }


def reference(seed: int, plan: Plan) -> dict[str, Any]:
    """The same plan in a plain float64 loop over the ranks: losses, and each rank's gradient [step][rank][name]."""
    torch.manual_seed(seed)
    model = copy.deepcopy(Layers()).double()
    losses, gradients = [], []
    for step, micros in enumerate(plan):
        rows, own = [], []
        for rank in range(dist.get_world_size()):
            model.zero_grad(set_to_none=True)
            row = []
            for micro, passes in enumerate(micros):
                loss = model(numbers(seed, step, micro, rank).double(), passes[rank])
                (loss / len(micros)).backward()
                row.append(loss.item())
            rows.append(row)
            own.append(
                {
                    name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                    for name, p in model.named_parameters()
                }
            )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.sub_(RATE * sum(gradient[name] for gradient in own) / len(own))
        losses.append(rows)
        gradients.append([{name: value.tolist() for name, value in gradient.items()} for gradient in own])
    return {"rate": RATE, "losses": losses, "gradients": gradients}


def trained(folder: Path, seed: int, bare: list[tuple[str, int]], checked: list[tuple[str, int]]) -> dict[str, Any]:
    """(plan, stage) pairs, run with and without checks."""
    return {
        "reference": {name: reference(seed, PLANS[name]) for name, _ in bare},
        "bare": {f"{name}, {stage}": train(seed, PLANS[name], stage, checked=False) for name, stage in bare},
        "checked": {f"{name}, {stage}": train(seed, PLANS[name], stage, checked=True) for name, stage in checked},
    }


class Adapted(nn.Module):
    """A trained layer beside a frozen one."""

    def __init__(self, seed: int, base_seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.adapter = nn.Linear(WIDTH, WIDTH)
        torch.manual_seed(base_seed)
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.base(x) + self.adapter(x)).square().mean()


class Heard(logging.Handler):
    """Keeps what DeepSpeed's logger says."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def bases(folder: Path, seed: int, stages: list[int]) -> dict[str, Any]:
    """See :func:`other_base`, by stage."""
    return {str(stage): other_base(folder / str(stage), seed, stage) for stage in stages}


def other_base(folder: Path, seed: int, stage: int) -> dict[str, Any]:
    """DeepSpeed's checkpoints and ours, loaded onto the frozen base they were made with and onto another one."""

    def engine_of(model: nn.Module, *, universal: bool = False) -> Any:
        adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
        config = {
            "train_micro_batch_size_per_gpu": ROWS,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "checkpoint": {"load_universal": universal},
        }
        optimizer = torch.optim.AdamW(adapter, lr=RATE)
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    def losses(engine: Any, *steps: int) -> list[list[float]]:
        found = []
        for step in steps:
            loss = engine(numbers(seed, step, dist.get_rank()))
            engine.backward(loss)
            engine.step()
            found.append(gather_objects(loss.item()))
        return found

    model = Adapted(seed, base_seed=seed)
    bases = checkpoint.fingerprints(model)
    engine = engine_of(model)
    losses(engine, 0, 1)
    version = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
    for kind in ("full", "trainables"):
        only = kind == "trainables"
        engine.save_checkpoint(str(folder / kind), tag="t", exclude_frozen_parameters=only, client_state=version)
    ours = save(engine, folder / "ours", 2, {"bases": bases})
    result: dict[str, Any] = {"continued": losses(engine, 2, 3)}
    if dist.get_rank() == 0:
        options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
        where = {"input_folder": str(folder / "full/t"), "output_folder": str(folder / "universal/t")}
        ds_to_universal.main(Namespace(**options, **where, inject_missing_state=stage < 3))
        (folder / "universal/latest").write_text("t")
    dist.barrier()
    heard = Heard()
    for kind, base in product(("full", "trainables", "universal"), ("same", "other")):
        engine = engine_of(Adapted(seed, base_seed=seed + (base == "other")), universal=kind == "universal")
        heard.lines.clear()
        logging.getLogger("DeepSpeed").addHandler(heard)
        path, _ = engine.load_checkpoint(str(folder / kind), tag="t", load_module_strict=kind == "full")
        logging.getLogger("DeepSpeed").removeHandler(heard)
        lines = gather_objects(list(heard.lines))
        result[f"{kind}, {base}"] = {"path": path, "lines": lines, "losses": losses(engine, 2, 3)}
    for base in ("same", "other"):
        try:
            now = checkpoint.fingerprints(Adapted(seed, base_seed=seed + (base == "other")))
            check_bases(ours, Portable(ours).state["bases"], now)
            result[f"ours, {base}"] = None
        except UserErrors as error:
            result[f"ours, {base}"] = str(error)
    return result
