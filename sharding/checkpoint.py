"""What of a model a checkpoint keeps, and bringing it back into a module or an engine of any world size and stage."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from sharding.engine_state import MOMENTS, create_moments, set_adam_step, set_master, set_moment
from sharding.errors import UserError
from sharding.portable import Portable

RECIPE = "Use the recipe of that run."


def load(engine: Any, checkpoint: Portable) -> None:
    """Restores masters, moments and Adam's step into an engine whose module already holds the weights
    (`load_weights`). Each rank reads what is whole and keeps its share.

    Raises:
        UserError: moments are missing or of other shapes.
    """
    stored = set(checkpoint.names("optimizer"))
    if stored:
        create_moments(engine)
    for name, parameter in trainables(engine.module).items():
        set_master(engine, parameter, checkpoint.tensor("model", name))  # mapped: only the share is read and copied
        for which in MOMENTS if stored else ():
            key, shape = f"{which}.{name}", list(getattr(parameter, "ds_shape", parameter.shape))
            found = checkpoint.shape("optimizer", key) if key in stored else None
            if found != shape:
                problem = f"has {key} of shape {found}, this model needs {shape}"
                raise UserError(str(checkpoint.directory), problem, RECIPE)
            set_moment(engine, parameter, which, checkpoint.tensor("optimizer", key))
    if stored:
        set_adam_step(engine, adam_step(checkpoint))


def adam_step(checkpoint: Portable) -> int:
    """Updates Adam had made.

    Raises:
        UserError: the state does not tell.
    """
    step = checkpoint.state.get("adam_step")
    if not isinstance(step, int) or step < 1:
        raise UserError(str(checkpoint.directory / "state.json"), f"has adam_step {step!r}", "Use another checkpoint.")
    return step


def load_weights(module: nn.Module, checkpoint: Portable) -> None:
    """Copies the checkpoint's weights and buffers into a plain module (before an engine is built around it, or
    for evaluation).

    Raises:
        UserError: names or shapes differ: the checkpoint belongs to another recipe.
    """
    targets = {**trainables(module), **buffers(module)}
    odd = sorted(targets.keys() ^ set(checkpoint.names("model")))
    if odd:
        raise UserError(
            str(checkpoint.directory),
            f"holds other parameters than this model ({len(odd)} differ, first {odd[0]})",
            RECIPE,
        )
    for name, target in targets.items():
        shape = checkpoint.shape("model", name)
        if list(target.shape) != shape:
            raise UserError(
                str(checkpoint.directory), f"{name} has shape {shape}, this model has {list(target.shape)}", RECIPE
            )
        target.data.copy_(checkpoint.tensor("model", name))


def fingerprints(module: nn.Module) -> dict[str, str]:
    """Of each part of the model (its direct children) with frozen weights: SHA-256 over names, shapes and bytes of
    these, and of the scales of quantised ones. A checkpoint fits these bases only.
    """
    totals: dict[str, Any] = {}
    frozen = {name: parameter for name, parameter in module.named_parameters() if not parameter.requires_grad}
    for name, value in sorted({**frozen, **scales(module)}.items()):
        total = totals.setdefault(name.split(".")[0], hashlib.sha256())
        total.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return {part: total.hexdigest() for part, total in totals.items()}


def trainables(module: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def buffers(module: nn.Module) -> dict[str, Tensor]:
    """Persistent buffers by name."""
    registered = dict(module.named_buffers(remove_duplicate=False))
    return {name: value for name, value in module.state_dict().items() if name in registered}


def scales(module: nn.Module) -> dict[str, Tensor]:
    """What layers of bitsandbytes store besides their integer weights, which are frozen like these."""
    known = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    return {name: value for name, value in module.state_dict().items() if name not in known}
