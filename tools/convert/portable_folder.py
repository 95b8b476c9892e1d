"""Portable checkpoints of ours as source and as result (the files are described in sharding/portable.py)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharding import portable
from sharding.errors import UserError
from sharding.portable import MANIFEST, Portable
from tools.convert.base import find_base, stock_shapes
from tools.convert.held import Held, Tensors, nothing, read_portable
from tools.convert.merge import by_module, scale_of
from tools.convert.source import CALLED, KEY, PREFIX, Context, Outgoing, Part, Run, Source, select, together
from tools.convert.whole import adapter_config

MOMENTS = ("exp_avg.", "exp_avg_sq.")


def checkpoint_of(path: Path) -> Path:
    """The checkpoint itself, or the best one of a run directory."""
    return Run(path).checkpoint() if (path / "recipe.yaml").is_file() else path.resolve()


def detect(path: Path) -> bool:
    """Whether a folder is a checkpoint of ours, or a run that has one."""
    return (path / MANIFEST).is_file() or (path / "recipe.yaml").is_file()


def read(path: Path, context: Context) -> Source:
    """A checkpoint; every byte is compared with its manifest."""
    folder = checkpoint_of(path)
    held = read_portable(Portable(folder))
    checksums = {folder / name: entry.sha256 for name, entry in portable.read_manifest(folder).files.items()}
    return Source(held, [*sorted(checksums), folder / MANIFEST], complete=True, checksums=checksums)


def plan(source: Source, context: Context) -> Outgoing:
    """A checkpoint; see `assembled`."""
    held, left, notes = assembled(source, context)

    def save(place: Path, chosen: Tensors) -> None:
        portable.write(
            place,
            ((name, chosen.read(name)) for name in held.weights.shapes),
            ((name, chosen.read(name)) for name in held.moments.shapes),
            held.state,
        )

    tensors = together(held.weights, held.moments)
    files = ["state.json", MANIFEST]
    return Outgoing(tensors, save, reopened, "sharding.portable", files=files, left_out=left, notes=notes)


def assembled(source: Source, context: Context) -> tuple[Held, list[str], list[str]]:
    """All that a run trains: the source's own, or the run's best checkpoint with the source's weights in it; what is
    left out, and what a user should know.

    Raises:
        UserError: the source is not whole and no run is given, or the two do not fit.
    """
    left, notes = list(source.left_out), []
    state = dict(source.held.state)
    weights, moments = source.held.weights, source.held.moments
    run = context.run if source.complete else context.needs_run("its checkpoint gives what the source does not hold")
    if run is not None:
        best = read_portable(run.best())
        check_shapes(weights, best.weights)
        if weights.shapes.keys() == best.weights.shapes.keys():
            state = {**best.state, **state}
        else:
            weights = select(weights, fitting(source, context, run, best), torch.float32)
            rest = len(best.weights.shapes) - len(weights.shapes)
            notes.append(f"{len(weights.shapes)} weights are the source's, {rest} those of {run.best().directory.name}")
            weights, moments, state = together(best.weights, weights), nothing(), dict(best.state)
            left.append("the optimizer's moments: they belong to other weights")
    if not moments.shapes:
        state["adam_step"] = 0
    return Held(weights, moments, state), left, notes


def check_shapes(weights: Tensors, wanted: Tensors) -> None:
    """Compares shapes of what both hold.

    Raises:
        UserError: one differs.
    """
    for name in sorted(weights.shapes.keys() & wanted.shapes.keys()):
        if weights.shapes[name] != wanted.shapes[name]:
            raise UserError(
                "SRC",
                f"has {name} of shape {weights.shapes[name]}, the run's model {wanted.shapes[name]}",
                "Give a run whose recipe has these widths.",
            )


def fitting(source: Source, context: Context, run: Run, best: Held) -> dict[str, str]:
    """Names of the source's weights that the run trains; whatever it does not train must be frozen alike.

    Raises:
        UserError: the source's model is another one than the run's.
    """
    names = source.held.weights.shapes.keys()
    parts: list[Part] = ["llm", "audio"]
    for part in parts:
        if part in source.models:
            check_frozen(source, context, run, part, best)
        if part in source.adapters:
            check_adapter(source, run, part)
            mine, wanted = (held.state.get("bases", {}).get(part) for held in (source.held, best))
            if mine and wanted and mine != wanted:
                raise UserError(
                    "SRC", f"holds an adapter of another {CALLED[part]} than the run's", "Give a run of the same base."
                )
    taken = {name: name for name in names if name in best.weights.shapes}
    frozen = {f"{PREFIX[part]}{name}" for part in source.models for name in stock_shapes(source.models[part], part)}
    odd = sorted(names - taken.keys() - frozen)
    if odd:
        raise UserError("SRC", f"holds {odd[0]}, which the run does not train", "Give the run it belongs to.")
    if not taken:
        raise UserError("SRC", "holds nothing that the run trains", "Give another --run.")
    adapted = by_module(name for name in best.weights.shapes if name.startswith(tuple(PREFIX.values())))
    for module, pieces in by_module(taken).items():
        if adapted[module].keys() != pieces.keys():
            raise UserError("SRC", f"lacks a part of the adapter of {module}", "Give the whole adapter.")
    return taken


def check_frozen(source: Source, context: Context, run: Run, part: Part, best: Held) -> None:
    """A whole model becomes part of a run only where the run trains that part in full, and beside the same frozen rest.

    Raises:
        UserError: it does not.
    """
    settings = run.recipe.audio if part == "audio" else run.recipe.text
    key = KEY[part]
    start = f"To start training from this folder, write {key}.pretrained: FOLDER in a recipe."
    if settings.tuning != "full":
        raise UserError(
            "SRC", f"is a whole {CALLED[part]}, and the run trains {settings.tuning} of it ({key}.tuning)", start
        )
    base = find_base(context, part)
    prefix = PREFIX[part]
    for name in base.tensors.shapes:
        ours = f"{prefix}{name}"
        if ours in best.weights.shapes or ours not in source.held.weights.shapes:
            continue
        mine = source.held.weights.read(ours)
        if not torch.equal(base.tensors.read(name).to(mine.dtype), mine):
            raise UserError("SRC", f"has other values in {name}, which the run keeps frozen", start)


def check_adapter(source: Source, run: Run, part: Part) -> None:
    """Compares what the source says of its adapter with the run's recipe.

    Raises:
        UserError: they differ.
    """
    mine = source.adapters[part]
    modules = by_module(name for name in source.held.weights.shapes if name.startswith(PREFIX[part]))
    without = Source(source.held, [])
    wanted: Any = adapter_config(without, Context(run), part, modules)
    key = KEY[part]
    if mine.peft_type != wanted.peft_type or getattr(mine, "use_dora", False) != getattr(wanted, "use_dora", False):
        raise UserError(
            "SRC", f"holds another kind of adapter than {key}.tuning of the run", "Give a run of that kind."
        )
    values = (scale_of(mine), scale_of(wanted)) if hasattr(mine, "lora_alpha") else (
        mine.projection_prng_key, wanted.projection_prng_key
    )  # fmt: skip
    if values[0] != values[1]:
        what = "scaled by" if hasattr(mine, "lora_alpha") else "drawn from the seed"
        raise UserError(
            "SRC", f"holds an adapter {what} {values[0]:g}, the run's is {what} {values[1]:g}", "Give a run alike."
        )


def reopened(place: Path) -> Iterable[tuple[str, Tensor]]:
    """All tensors of a checkpoint, each byte compared with its manifest."""
    checkpoint = Portable(place)
    yield from checkpoint.tensors("model")
    yield from checkpoint.tensors("optimizer")
