"""SLAM-LLM's `model.pt` (arXiv 2402.08846) and DeepSpeed's `pytorch_model.bin`: projector and adapters by name."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from sharding.errors import UserError
from tools.convert.held import Held, Tensors
from tools.convert.merge import piece_of
from tools.convert.pickles import keys_of, load_pickle, tensors_of
from tools.convert.source import PREFIX, Context, Outgoing, Source, in_memory, others, select

FILE = "model.pt"
PLACES = (FILE, "pytorch_model.bin")
PROJECTOR, LLM = "encoder_projector.", "llm.base_model.model."
OURS = ("audio.", "llm.causal.", "projector.", "fusion.", "text_features.")


def file_of(path: Path) -> Path | None:
    """The file itself, or the one in a folder."""
    if path.is_file():
        return path
    return next((path / place for place in PLACES if (path / place).is_file()), None)


def detect(path: Path) -> bool:
    """Whether a file's names are SLAM-LLM's, or ours in DeepSpeed's consolidated file."""
    file = file_of(path)
    if file is None or (path / "config.json").is_file():
        return False
    keys = keys_of(file)
    return any(our_name(key) is not None for key in keys)


def our_name(key: str) -> str | None:
    """A name of SLAM-LLM → ours; None for what our model does not have."""
    key = key.removeprefix("module.")
    if key.startswith(PROJECTOR):
        return "projector." + key.removeprefix(PROJECTOR)
    if key.startswith(LLM) and piece_of(key):
        return PREFIX["llm"] + key.removeprefix(LLM)
    return key if key.startswith(OURS) else None


def read(path: Path, context: Context) -> Source:
    """Projector and adapters of a file; whatever else it holds is left out.

    Raises:
        UserError: it cannot be read, or is refused.
    """
    file = file_of(path)
    assert file is not None
    held = load_pickle(file)
    for key in ("model", "module", "state_dict"):
        if isinstance(held, dict) and isinstance(held.get(key), dict):
            held = held[key]
    found = tensors_of(held, file)
    names = {ours: key for key in found if (ours := our_name(key)) is not None}
    left = len(found) - len(names)
    wild = next(
        (key for key in names.values() if found[key].is_floating_point() and not found[key].isfinite().all()), ""
    )
    if wild:
        raise UserError(str(file), f"has values in {wild} that are not finite", "Give another checkpoint.")
    return Source(
        Held(select(in_memory(found), names)),
        [file],
        complete=any(name.startswith("fusion.") for name in names),  # under our names, DeepSpeed's consolidated run
        left_out=[f"{left} weights that are neither projector nor adapter"] if left else [],
    )


def plan(source: Source, context: Context) -> Outgoing:
    """Projector and the language model's adapters, in fp32 unless `--dtype` is given.

    Raises:
        UserError: the source has neither.
    """
    names = {}
    for name in source.held.weights.shapes:
        if name.startswith("projector."):
            names[PROJECTOR + name.removeprefix("projector.")] = name
        elif name.startswith(PREFIX["llm"]) and piece_of(name):
            names[LLM + name.removeprefix(PREFIX["llm"])] = name
    if not names:
        raise UserError("SRC", "holds neither a projector nor an adapter of the language model", "Choose another --to.")
    tensors = select(source.held.weights, names, context.dtype)
    notes = []
    if any(name.startswith(LLM) for name in names) and context.run is not None:
        settings = context.run.recipe.text
        adapter = getattr(settings, settings.tuning, None)
        if adapter is not None:
            notes.append(f"SLAM-LLM must be told the adapter's settings, which its file lacks: {adapter!r}")
    return Outgoing(
        tensors,
        lambda place, chosen: save_pickle(place / FILE, contiguous(chosen)),
        lambda place: reopened(place / FILE),
        "torch.load(weights_only=True)",
        files=[FILE],
        left_out=others(source, names.values()),
        notes=notes,
    )


def save_pickle(path: Path, value: object) -> None:
    """torch.save, forced to disk.

    Raises:
        OSError: the disk refuses it.
    """
    with path.open("wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # how torch reports what the disk refuses
            raise OSError(None, str(error), str(path)) from None
        file.flush()
        os.fsync(file.fileno())


def reopened(path: Path) -> Iterable[tuple[str, Tensor]]:
    """The tensors of the file."""
    return iter(tensors_of(load_pickle(path), path).items())


def contiguous(tensors: Tensors) -> dict[str, Tensor]:
    """All tensors, each with memory of its own: torch.save writes whole storages."""
    return {name: x.contiguous().clone() for name, x in tensors}
