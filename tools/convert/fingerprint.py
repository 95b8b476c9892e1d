"""Whether frozen weights are those that a checkpoint was trained beside: its fingerprints, computed once more."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from dist_train.adapters import OUTPUT
from dist_train.quantise import quantised
from sharding.errors import UserError
from tools.convert.base import Base
from tools.convert.held import Tensors
from tools.convert.merge import by_module
from tools.convert.source import CALLED, PREFIX, Part, Run

# Linear layers that a quantised model keeps as they are.
PLAIN: dict[Part, set[str]] = {"llm": OUTPUT, "audio": {"gru_rel_pos_linear"}}


def check_base(base: Base, run: Run, part: Part, trained: Tensors, expected: str | None) -> list[str]:
    """Compares frozen weights with the fingerprint that the checkpoint keeps of them; of a quantised run that of the
    quantised weights, so they are quantised once more, layer by layer.

    Args:
        trained: weights of the checkpoint.
        expected: the fingerprint.

    Returns:
        That they were not compared, if the checkpoint keeps none.

    Raises:
        UserError: they are others.
    """
    if expected is None:
        return [f"the {CALLED[part]}'s base was not compared: the source keeps no fingerprint of it"]
    if fingerprint(base, run, part, trained) != expected:
        raise UserError(
            str(base.folder or run.path),
            f"holds other weights than the {CALLED[part]} this checkpoint was trained on",
            "Give the original folder by --base.",
        )
    return []


def fingerprint(base: Base, run: Run, part: Part, trained: Tensors) -> str:
    """sharding.checkpoint's fingerprint of a part."""
    settings: Any = run.recipe.audio if part == "audio" else run.recipe.text
    adapted = {module.removeprefix(PREFIX[part]) for module in by_module(trained.shapes)}
    found: dict[str, list[str]] = {}  # our name of a parameter, or of a quantised layer with a dot behind it
    for name in base.tensors.shapes:
        module, dot, last = name.rpartition(".")
        ours = PREFIX[part] + module + dot + ("base_layer." if module in adapted else "")
        if ours + last in trained.shapes or (part == "audio" and cut_off(run, base.config, name)):
            continue
        linear = last in ("weight", "bias") and len(base.tensors.shapes.get(f"{module}.weight", [])) == 2
        if settings.quantisation != "none" and linear and is_linear(module, part):
            found.setdefault(ours, []).append(name)
        else:
            found[ours + last] = [name]
    total = hashlib.sha256()
    for ours, names in sorted(found.items()):  # no key begins another: what a layer has stays together
        for name, value in entries(ours, names, base, run, settings):
            total.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            total.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def is_linear(module: str, part: Part) -> bool:
    """Whether a module with a matrix is a linear layer that is quantised: not an embedding, nor one that stays."""
    last = module.rsplit(".", 1)[-1]
    return "embed" not in last and last not in PLAIN[part]


def entries(ours: str, names: list[str], base: Base, run: Run, settings: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and values that a run's model has of a parameter or a quantised layer, sorted."""
    values = {name.rpartition(".")[2]: base.tensors.read(name) for name in names}
    dtype = run.recipe.dtype
    values = {name: x.to(dtype) if x.is_floating_point() else x for name, x in values.items()}
    if not ours.endswith("."):
        yield ours, next(iter(values.values()))
        return
    outputs, inputs = values["weight"].shape
    layer = nn.Linear(inputs, outputs, bias="bias" in values, device="meta")
    layer.load_state_dict(values, assign=True)
    made = quantised(layer, settings.quantisation, settings.int8_threshold, dtype)
    yield from sorted((ours + name, value) for name, value in made.state_dict().items())


def cut_off(run: Run, config: PretrainedConfig, name: str) -> bool:
    """Whether a run's WavLM lacks a weight because nothing reads the layers above `audio.layer`."""
    if run.recipe.simulation.imagines:
        return False
    count = config.num_hidden_layers
    layer = run.recipe.audio.layer % (count + 1)
    if name.startswith("encoder.layer_norm."):
        return bool(config.do_stable_layer_norm) and layer < count
    split = name.split(".")
    return split[:2] == ["encoder", "layers"] and int(split[2]) >= layer
