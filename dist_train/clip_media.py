"""What the shards still have of a run's clips: transcript and sound, to be shown. Nothing here ends in an error: what
cannot be read is said.
"""

from __future__ import annotations

import io
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile

from dist_train.task import task_of
from sharding.errors import UserError, UserErrors, plain
from sharding.files import opened
from sharding.shards import SAMPLE_RATE, Dims, read_sample
from sharding.table import Table, open_table

LONGEST_PLAYED = 10.0  # seconds; 320 kB as 16 bit
ENVELOPE = 300  # parts of a clip's waveform that are drawn
MOST_SAMPLE = 1 << 28  # bytes of a clip in its tar: an hour of sound and as much again


class Clip(NamedTuple):
    """One clip of the shards.

    text: transcript, None without; wav: 16 bit mono of its first `LONGEST_PLAYED` seconds, empty without a waveform;
    seconds: of the whole waveform; envelope: [n] its largest amplitude in each of n equal parts;
    problem: why there is nothing, "" if there is.
    """

    text: str | None = None
    wav: bytes = b""
    seconds: float = 0.0
    envelope: np.ndarray = np.empty(0)
    problem: str = ""


class Corpus:
    """One split of the dataset, or of the mix, that a recipe names. A dataset is opened when a clip of it is read.

    Args:
        recipe: as read from a run directory: it may hold anything.
    """

    def __init__(self, recipe: dict[str, Any], split: str) -> None:
        self.split = split
        self.roots, self.task = roots(recipe), task_of(recipe)
        self._open: dict[str, tuple[Dims, Table] | Exception] = {}

    def read(self, key: str, label: float) -> Clip:
        """The clip of this key and label."""
        try:
            return self._read(key, label)
        # Of a damaged or forged dataset anything may be raised; the page is about the run and shows what is left.
        except Exception as error:
            return Clip(problem=said(error))

    def _read(self, key: str, label: float) -> Clip:
        name, _, rest = key.rpartition("/")  # a mix has NAME/KEY; neither holds a slash
        dims, table = self._dataset(name)
        where = f"{self.roots[name]}, split {self.split}"
        row = bisect_left(table.key, rest)
        if row == len(table) or table.key[row] != rest:
            raise UserError(where, f"has no clip {key} any more", "")
        kept = float(self.task.targets(table.label[row : row + 1])[0])
        if not abs(kept - label) <= 1e-5 * max(1.0, abs(label)):  # the file of predictions has six digits
            raise UserError(where, f"now has another clip {key}, of label {table.label[row]:g}", "")
        size = int(table.size[row])
        if not 0 < size <= MOST_SAMPLE:
            raise UserError(where, f"has a clip {key} of {size} bytes, at most {MOST_SAMPLE} are read", "")
        tar = Path(table.tars[int(table.tar[row])])
        offset, checksum = int(table.offset[row]), table.sha256[row].tobytes().hex()
        with opened(tar, "") as (file, _):
            sample = read_sample(file.fileno(), str(tar), dims, key=rest, offset=offset, size=size, sha256=checksum)
        audio = sample["audio"]
        if audio is None or audio.ndim != 1:
            return Clip(sample["text"])
        return Clip(sample["text"], wav_of(audio), len(audio) / SAMPLE_RATE, envelope_of(audio))

    def _dataset(self, name: str) -> tuple[Dims, Table]:
        """Widths and index of the dataset of this name; one that cannot be opened is not tried again."""
        if name not in self.roots:
            raise UserError(
                "recipe.yaml", f"names no dataset {name}" if self.roots and name else "names no dataset", ""
            )
        if name not in self._open:
            try:
                info, table = open_table(self.roots[name], self.split)
                self._open[name] = info.dims, table
            except Exception as error:  # see read
                self._open[name] = error
        found = self._open[name]
        if isinstance(found, Exception):
            raise found
        return found


def roots(recipe: dict[str, Any]) -> dict[str, Path]:
    """Directory of each dataset by its name in keys; that of `data.path` is "". Empty where none can be told."""
    data = recipe.get("data")
    if not isinstance(data, dict):
        return {}
    path, sources = data.get("path"), data.get("sources")
    if isinstance(path, str):
        return {"": Path(path)}
    found = {}
    for source in sources if isinstance(sources, Sequence) and not isinstance(sources, str) else ():
        path = source.get("path") if isinstance(source, dict) else None
        if isinstance(path, str):
            try:
                found[str(source.get("name") or Path(path).resolve().name)] = Path(path)
            except (OSError, ValueError, RuntimeError):  # no path at all, or links in a circle
                continue
    return found


def said(error: Exception) -> str:
    """An error as one sentence. The remedy of a UserError is left out: it is for who trains."""
    first = error.errors[0] if isinstance(error, UserErrors) and error.errors else error
    if isinstance(first, UserError):
        return f"{plain(first.where)}: {plain(first.problem)}."
    return f"The shards are damaged ({plain(str(first) or type(first).__name__)})."


def envelope_of(audio: np.ndarray) -> np.ndarray:
    """The largest amplitude of a waveform [samples] in each of up to `ENVELOPE` equal parts [n]."""
    edges = np.linspace(0, len(audio), min(ENVELOPE, len(audio)) + 1).astype(int)[:-1]
    return np.maximum.reduceat(np.abs(audio), edges) if len(audio) else np.empty(0)


def wav_of(audio: np.ndarray) -> bytes:
    """The beginning of a waveform [samples] in [-1, 1] as a WAV file of 16 bit; nothing of an empty one."""
    played = audio[: int(LONGEST_PLAYED * SAMPLE_RATE)]
    if not len(played):
        return b""
    file = io.BytesIO()
    soundfile.write(file, played, SAMPLE_RATE, format="WAV", subtype="PCM_16")  # clips what is louder
    return file.getvalue()
