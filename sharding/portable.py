"""Portable checkpoints on disk: tensors by parameter name, whole or not there at all (DESIGN §3).

step_00000042/
  model-00001-of-00002.safetensors      fp32 masters of the trainables and persistent buffers, by name
  optimizer-00001-of-00002.safetensors  "exp_avg.<name>", "exp_avg_sq.<name>" in fp32
  state.json                            Adam's step, and what the trainer adds: progress, fingerprints of frozen bases
  manifest.json                         size and SHA-256 of each file; written last, decides validity

Each writer has one file of each kind; a tensor lies whole in one of them. How many files there are says nothing about
who may read them. All is written into step_00000042.writing, forced to disk, and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import BaseModel, Field, NonNegativeInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sharding.errors import UserError
from sharding.files import MOST_JSON, read_bounded

FORMAT = "dist-train-checkpoint/1"
STATE, MANIFEST = "state.json", "manifest.json"
WRITING = ".writing"  # ends the name of a checkpoint that is not complete
ANOTHER = "Use another checkpoint of the run."
SHARD_BYTES = 4 << 30  # of a file, where one process writes a whole checkpoint

Kind = Literal["model", "optimizer"]
FileName = Annotated[str, Field(pattern=r"^((model|optimizer)-\d{5}-of-\d{5}\.safetensors|state\.json)$")]


class Entry(BaseModel):
    """A file as the manifest lists it."""

    bytes: NonNegativeInt
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    """manifest.json."""

    format: Literal["dist-train-checkpoint/1"]
    files: dict[FileName, Entry]


class Portable:
    """A checkpoint opened for reading, tensor by tensor.

    Args:
        directory: step_XXXXXXXX.
        checksums: compare every byte with the manifest, not only the sizes.

    Attributes:
        state: state.json.

    Raises:
        UserError: a missing, truncated or altered file, by name.
    """

    def __init__(self, directory: Path, *, checksums: bool = True) -> None:
        self.directory = directory
        manifest = read_manifest(directory)
        for name, entry in manifest.files.items():
            check_file(directory / name, entry, checksums=checksums)
        self.state = read_json(directory / STATE)
        self._files: dict[Kind, dict[str, Any]] = {kind: {} for kind in get_args(Kind)}
        for name in sorted(manifest.files.keys() - {STATE}):
            self._open("model" if name.startswith("model") else "optimizer", directory / name)

    def _open(self, kind: Kind, path: Path) -> None:
        try:
            file = safe_open(path, "pt")
            held = list(file.keys())
        except (OSError, SafetensorError) as error:
            raise UserError(str(path), f"cannot be read ({error})", ANOTHER) from None
        twice = self._files[kind].keys() & set(held)
        if twice:
            raise UserError(str(path), f"holds {min(twice)}, which another file of the checkpoint holds too", ANOTHER)
        self._files[kind].update(dict.fromkeys(held, file))

    def names(self, kind: Kind) -> list[str]:
        """Names of the tensors, sorted; of the optimizer's none before the first step."""
        return sorted(self._files[kind])

    def shape(self, kind: Kind, name: str) -> list[int]:
        """Shape of a tensor, without reading it."""
        return self._files[kind][name].get_slice(name).get_shape()

    def dtype(self, kind: Kind, name: str) -> torch.dtype:
        """Kind of its numbers; reads one row at most."""
        rows = self._files[kind][name].get_slice(name)
        return rows[:1].dtype if rows.get_shape() else self.tensor(kind, name).dtype

    def tensor(self, kind: Kind, name: str) -> Tensor:
        """One tensor, on the CPU."""
        return self._files[kind][name].get_tensor(name)

    def tensors(self, kind: Kind) -> Iterator[tuple[str, Tensor]]:
        """All tensors, one by one."""
        return ((name, self.tensor(kind, name)) for name in self.names(kind))


def read_manifest(directory: Path) -> Manifest:
    """manifest.json of a checkpoint.

    Raises:
        UserError: there is none that is valid, or it lists no weights.
    """
    try:
        manifest = Manifest.model_validate_json(read_bounded(directory / MANIFEST, MOST_JSON, ANOTHER))
        missing = {STATE, *(kind for kind in get_args(Kind))} - {name.split("-")[0] for name in manifest.files}
        reason = f"it lists no {min(missing)}" if missing else None
    except OSError as error:
        reason = error.strerror
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
    if reason is not None:
        raise UserError(
            str(directory),
            f"is not a complete checkpoint (no valid manifest.json: {reason})",
            "Give another checkpoint directory.",
        )
    return manifest


def check_file(path: Path, entry: Entry, *, checksums: bool) -> None:
    """Compares a file with its entry.

    Raises:
        UserError: it differs.
    """
    try:
        # A device or a FIFO has 0 bytes by its entry and no end.
        whole = (
            path.is_file() and path.stat().st_size == entry.bytes and (not checksums or digest(path) == entry.sha256)
        )
    except OSError:
        whole = False
    if not whole:
        raise UserError(str(path), "is missing or damaged (it differs from manifest.json)", ANOTHER)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        UserError: it does not.
    """
    try:
        value = json.loads(read_bounded(path, MOST_JSON, ANOTHER))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(str(path), f"cannot be read ({error})", ANOTHER) from None
    if not isinstance(value, dict):
        raise UserError(str(path), "holds no JSON object", ANOTHER)
    return value


def part_name(kind: Kind, number: int, of: int) -> str:
    """File name of part `number` (from 1) of `of`."""
    return f"{kind}-{number:05d}-of-{of:05d}.safetensors"


def writing(directory: Path) -> Path:
    """Where a checkpoint lies until it is complete."""
    return directory.with_name(directory.name + WRITING)


def begin(directory: Path) -> Path:
    """Makes the place to write into, anew. One process calls this."""
    place = writing(directory)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    return place


def write_part(place: Path, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    """Writes one file and forces it to disk.

    Raises:
        OSError: the disk refuses it.
    """
    path = place / name
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:  # how safetensors reports what the disk refuses
        raise OSError(None, str(error), str(path)) from None
    return {name: seal(path)}


def seal(path: Path) -> Entry:
    """Forces a file to disk; its entry."""
    flush(path)
    return Entry(bytes=path.stat().st_size, sha256=digest(path))


def commit(directory: Path, files: Mapping[str, Entry], state: Mapping[str, Any]) -> None:
    """Adds state and manifest to what lies in `writing(directory)` and makes it the checkpoint. One process calls this.

    Raises:
        OSError: the disk refuses it.
        UserError: a file that was written is not seen here.
    """
    place = writing(directory)
    for name, entry in files.items():
        if not (place / name).is_file() or (place / name).stat().st_size != entry.bytes:
            raise UserError(
                str(place / name),
                "was written by another rank and is not seen by rank 0",
                "Give an --output that all nodes share.",
            )
    (place / STATE).write_text(json.dumps(state, indent=1))
    manifest = Manifest(format=FORMAT, files={**files, STATE: seal(place / STATE)})
    (place / MANIFEST).write_text(manifest.model_dump_json(indent=1))
    flush(place / MANIFEST)
    flush(place)
    shutil.rmtree(directory, ignore_errors=True)  # left by a run that was set back behind this step
    place.rename(directory)
    flush(directory.parent)


def write(
    directory: Path,
    weights: Iterable[tuple[str, Tensor]],
    moments: Iterable[tuple[str, Tensor]],
    state: Mapping[str, Any],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a whole checkpoint from one process, with no more in memory than one file's tensors.

    Args:
        weights, moments: (name, tensor), read once.
        shard_bytes: a file that has reached so many is closed.

    Raises:
        OSError: the disk refuses it; nothing is left then.
    """
    place = begin(directory)
    try:
        files: dict[str, Entry] = {}
        kinds: dict[Kind, Iterable[tuple[str, Tensor]]] = {"model": weights, "optimizer": moments}
        for kind, tensors in kinds.items():
            entries = [
                write_part(place, f"{kind}-{number}", part)[f"{kind}-{number}"]
                for number, part in enumerate(parts(tensors, shard_bytes))
            ]
            for number, entry in enumerate(entries):  # their number is known only now
                name = part_name(kind, number + 1, len(entries))
                (place / f"{kind}-{number}").rename(place / name)
                files[name] = entry
        commit(directory, files, state)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise


def parts(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    """Cuts a sequence of tensors where a part has reached `limit` bytes; at least one part."""
    part: dict[str, Tensor] = {}
    size, cut = 0, False
    for name, tensor in tensors:
        part[name] = tensor.to("cpu").contiguous()
        size += tensor.nbytes
        if size >= limit:
            yield part
            part, size, cut = {}, 0, True
    if part or not cut:
        yield part


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
