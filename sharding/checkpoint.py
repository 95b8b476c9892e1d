"""Portable checkpoints: trainables, moments and progress by parameter name, whole or not there at all (DESIGN §3).

step_00000042/
  model.safetensors       fp32 masters of the trainables and persistent buffers, by name
  optimizer.safetensors   "exp_avg.<name>", "exp_avg_sq.<name>"
  state.json              progress, Adam's step, world, seed, fingerprint of the frozen base
  manifest.json           size and SHA-256 of each file; written last, decides validity
last -> step_…   best -> step_…   replaced atomically
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sharding.engine_state import (
    MOMENTS,
    adam_step,
    create_moments,
    master,
    moment,
    set_adam_step,
    set_master,
    set_moment,
)
from sharding.errors import UserError

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


def save(engine: Any, root: Path, step: int, state: dict[str, Any], pointers: Iterable[str], *, keep: int = 2) -> Path:
    """Writes step_XXXXXXXX under `root` and moves the pointers (`last`, `best`) to it. Collective; rank 0 writes.

    Args:
        state: JSON-able progress; Adam's step is added.
        keep: checkpoints left besides those the pointers name.

    Raises:
        UserError: on every rank, when rank 0 cannot write (disk full, no permission). Earlier checkpoints stay usable.
    """
    directory = root / f"step_{step:08d}"
    weights, moments = whole_state(engine)
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            write(directory, weights, moments, {**state, "adam_step": adam_step(engine)})
            for name in pointers:
                point(root / name, directory.name)
            prune(root, keep)
        except OSError as error:
            problem = [f"cannot be written ({error.strerror or error})"]
        except Exception as error:  # safetensors reports I/O errors as its own exception
            if type(error).__name__ != "SafetensorError":
                raise
            problem = [f"cannot be written ({error})"]
    dist.broadcast_object_list(problem)
    if problem[0]:
        raise UserError(
            str(directory),
            problem[0],
            "Free space or permissions, then run again with --resume: earlier checkpoints are whole.",
        )
    return directory


def whole_state(engine: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and moments by name, gathered from all ranks; filled on rank 0 only (the others take part in the
    exchange).
    """
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    keep = dist.get_rank() == 0
    stepped = adam_step(engine) > 0
    for name, parameter in trainables(engine.module).items():
        value = master(engine, parameter)
        if keep:
            weights[name] = value.to("cpu", copy=True).contiguous()
        for which in MOMENTS if stepped else ():
            value = moment(engine, parameter, which)
            if keep:
                moments[f"{which}.{name}"] = value.to("cpu", copy=True).contiguous()
    if keep:
        weights.update(
            {name: value.to("cpu", copy=True).contiguous() for name, value in buffers(engine.module).items()}
        )
    return weights, moments


def write(directory: Path, weights: dict[str, Tensor], moments: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes all files beside the final place, forces them to disk, then renames."""
    temporary = directory.with_name(directory.name + ".writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file(weights, temporary / FILES[0])
        save_file(moments, temporary / FILES[1])
        (temporary / FILES[2]).write_text(json.dumps(state, indent=1))
        manifest = {
            name: {"bytes": (temporary / name).stat().st_size, "sha256": digest(temporary / name)} for name in FILES
        }
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in [*temporary.iterdir(), temporary]:
            flush(path)
        shutil.rmtree(directory, ignore_errors=True)  # left by a run that was set back behind this step
        temporary.rename(directory)
        flush(directory.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def load(engine: Any, directory: Path) -> dict[str, Any]:
    """Restores masters and moments into an engine whose module already holds the weights (`load_weights`). Returns
    the state. Collective.
    """
    state = read_state(directory)
    weights = load_file(directory / FILES[0])
    moments = load_file(directory / FILES[1])
    if moments:
        create_moments(engine)
    for name, parameter in trainables(engine.module).items():
        set_master(engine, parameter, weights[name].to(parameter.device))
        for which in MOMENTS if moments else ():
            set_moment(engine, parameter, which, moments[f"{which}.{name}"].to(parameter.device))
    if moments:
        set_adam_step(engine, state["adam_step"])
    return state


def load_weights(module: nn.Module, directory: Path) -> None:
    """Copies the checkpoint's weights and buffers into a plain module (before an engine is built around it, or
    for evaluation).

    Raises:
        UserError: names or shapes differ: the checkpoint belongs to another recipe.
    """
    weights = load_file(directory / FILES[0])
    targets = {**trainables(module), **buffers(module)}
    if weights.keys() != targets.keys():
        odd = sorted(weights.keys() ^ targets.keys())
        raise UserError(
            str(directory),
            f"holds other parameters than this model ({len(odd)} differ, first {odd[0]})",
            "Use the recipe of that run.",
        )
    for name, target in targets.items():
        if target.shape != weights[name].shape:
            raise UserError(
                str(directory),
                f"{name} has shape {list(weights[name].shape)}, this model has {list(target.shape)}",
                "Use the recipe of that run.",
            )
        target.data.copy_(weights[name])


def read_state(directory: Path) -> dict[str, Any]:
    """state.json of a checkpoint whose files all match its manifest.

    Raises:
        UserError: missing, truncated or altered files, each named.
    """
    try:
        manifest = json.loads((directory / "manifest.json").read_text())
        sizes = {name: (manifest[name]["bytes"], manifest[name]["sha256"]) for name in FILES}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            str(directory),
            "is not a complete checkpoint (no valid manifest.json)",
            "Give another checkpoint directory.",
        ) from None
    for name, (size, checksum) in sizes.items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != size or digest(path) != checksum:
            raise UserError(
                str(path), "is missing or damaged (it differs from manifest.json)", "Use another checkpoint of the run."
            )
    return json.loads((directory / FILES[2]).read_text())


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of all frozen parameters, and of the scales of quantised ones: a checkpoint
    fits this base only.
    """
    total = hashlib.sha256()
    frozen = {name: parameter for name, parameter in module.named_parameters() if not parameter.requires_grad}
    for name, value in sorted({**frozen, **scales(module)}.items()):
        total.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


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


def point(link: Path, name: str) -> None:
    """Makes `link` point to `name` in one atomic step."""
    temporary = link.with_name(link.name + ".new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    temporary.replace(link)


def prune(root: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints and those that pointers name."""
    pointed = {link.resolve().name for link in root.iterdir() if link.is_symlink()}
    steps = sorted(path for path in root.glob("step_????????") if path.name not in pointed)
    for path in steps[: max(len(steps) - keep, 0)]:
        shutil.rmtree(path)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Forces a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
