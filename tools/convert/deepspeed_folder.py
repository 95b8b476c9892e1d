"""DeepSpeed's checkpoints as source and as result of `dist-train convert`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from tools.convert import deepspeed_native, deepspeed_universal
from tools.convert.held import Held, Tensors
from tools.convert.portable_folder import assembled
from tools.convert.slam import our_name
from tools.convert.source import Context, Outgoing, Source, select, together


def read_native(path: Path, context: Context) -> Source:
    """What `engine.save_checkpoint` wrote."""
    return read(path, deepspeed_native.read)


def read_universal(path: Path, context: Context) -> Source:
    """A universal checkpoint."""
    return read(path, deepspeed_universal.read)


def read(path: Path, reader: Callable[..., Held]) -> Source:
    """What was trained, by our names; SLAM-LLM's are taken for ours."""
    said: list[str] = []
    held = reader(path, say=said.append)
    frozen = set(held.state.get("frozen", ()))
    names = {our_name(name) or name: name for name in held.weights.shapes if name not in frozen}
    foreign = any(ours != name for ours, name in names.items())
    moments = {}
    for full in held.moments.shapes:
        which, _, name = full.partition(".")
        moments[f"{which}.{our_name(name) or name}"] = full
    if frozen:
        said.append(f"{len(frozen)} frozen weights: they are the base's")
    state: dict[str, Any] = {key: value for key, value in held.state.items() if key not in ("frozen", "tied")}
    return Source(
        Held(select(held.weights, names), select(held.moments, moments), state),
        sorted(file for file in path.rglob("*") if file.is_file()),
        complete=not foreign,
        left_out=said,
    )


def plan(source: Source, context: Context) -> Outgoing:
    """A universal checkpoint; see `portable_folder.assembled`."""
    held, left, notes = assembled(source, context)

    def save(place: Path, chosen: Tensors) -> None:
        place.rmdir()  # it is made anew there
        weights = select(chosen, {name: name for name in held.weights.shapes})
        moments = select(chosen, {name: name for name in held.moments.shapes})
        deepspeed_universal.write(place, Held(weights, moments, held.state), say=notes.append)

    def reopen(place: Path) -> Iterable[tuple[str, Tensor]]:
        again = deepspeed_universal.read(place, say=notes.append)
        yield from again.weights
        yield from again.moments

    return Outgoing(
        together(held.weights, held.moments),
        save,
        reopen,
        "the reader of this format",
        files=["latest_universal", "zero/optimizer_state.pt"],
        left_out=left,
        notes=notes,
    )
