"""Foreign files of torch.save: tensors and plain values are read from them, nothing else."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharding.errors import UserError

BROKEN = (
    *(OSError, RuntimeError, ValueError, EOFError, KeyError, IndexError, TypeError, AttributeError),
    *(zipfile.BadZipFile, NotImplementedError),
)


def load_pickle(path: Path) -> Any:
    """What torch.save wrote, mapped from the file where it is a zip (torch 1.6 and later).

    Raises:
        UserError: it cannot be read, or reading it would run code; names the global it asks for.
    """
    zipped = path.is_file() and zipfile.is_zipfile(path)
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("it is compressed, which torch.save never does: it may hold any size")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        asked = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
        if asked is None:
            raise damaged(path, error) from None
        raise UserError(
            str(path),
            f"is refused: to read it, {asked[1]} would have to be run, and a foreign pickle may run anything",
            "Save its state_dict alone: torch.save({name: tensor}, FILE).",
        ) from None
    except BROKEN as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> UserError:
    """The error for a file that is truncated or of another kind."""
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return UserError(str(path), f"cannot be read ({reason})", "Give the whole file, as torch.save wrote it.")


def tensors_of(held: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a mapping by name; other values are left out.

    Raises:
        UserError: it is no mapping, or has no tensor.
    """
    found = {str(key): x for key, x in held.items() if isinstance(x, Tensor)} if isinstance(held, dict) else {}
    if not found:
        raise UserError(str(path), "holds no tensors by name", "Give a file that holds a state_dict.")
    odd = next((key for key, x in found.items() if x.layout != torch.strided or x.is_meta or x.is_quantized), None)
    if odd is not None:
        raise UserError(str(path), f"has values in {odd} that are no plain numbers", "Save dense tensors.")
    return found


def keys_of(path: Path) -> set[str]:
    """Keys of what a file holds, of the mappings one level down too; none for files of another kind."""
    try:
        held = load_pickle(path)
    except UserError:
        return set()
    if not isinstance(held, dict):
        return set()
    inner = {str(key) for value in held.values() if isinstance(value, dict) for key in value}
    return {str(key) for key in held} | inner


def explain(path: Path) -> None:
    """Says why a file of torch.save was not recognised, where it cannot be read or is refused.

    Raises:
        UserError: it is so.
    """
    files = [path] if path.is_file() else [path / name for name in ("model.pt", "pytorch_model.bin", "fusion.pt")]
    for file in files:
        if file.is_file() and file.suffix in (".pt", ".pth", ".bin"):
            load_pickle(file)
