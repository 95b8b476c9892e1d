"""MMSA's feature pickles (aligned_50.pkl, unaligned_39.pkl, …), and those of the same shape before them.

Source: github thuiar/MMSA. {"train" | "valid" | "test": {"id", "raw_text", "audio" [N, T, D], "vision", "text",
"text_bert" [N, 3, L], "regression_labels", "classification_labels", "annotations", "audio_lengths", …}}.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from sharding.errors import UserError
from sharding.shards import Split
from tools.imports.found import Found
from tools.imports.numpy_pickle import load_pickle
from tools.imports.splits import match_splits
from tools.progress import tracked
from tools.sources import Features, Held

STREAMS = {"audio": "audio", "vision": "vision", "text_features": "text"}  # ours: theirs
LABELS = ("regression_labels", "labels")
TOKENS = "text_bert"  # token numbers of raw_text, mask, segments: nothing that raw_text does not tell


def read(found: Found) -> None:
    """Adds the clips of a pickle. Padding is cut off where the pickle says how long the clips are.

    Raises:
        UserError: unreadable, or not of this layout.
    """
    held = load_pickle(found.source)
    where = str(found.source)
    if not isinstance(held, dict) or not all(isinstance(part, dict) for part in held.values()):
        raise UserError(where, "is no pickle of splits", "Give a feature pickle of MMSA, e.g. unaligned_50.pkl")
    parts = {_name(key): {_name(name): column for name, column in part.items()} for key, part in held.items()}
    splits = match_splits(parts, found.options.splits, where)
    told: dict[str, list[str]] = {}  # what was done to which splits
    for name, part in parts.items():
        if name in splits:
            for done in _Part(found, name, splits[name], part).read():
                told.setdefault(done, []).append(name)
        else:
            found.leave_out(name, "no split")
    for done, where_done in told.items():
        found.remark(f"{', '.join(where_done)}: {done}")


def _name(key: Any) -> str:
    return key.decode("latin1") if isinstance(key, bytes) else str(key)


class _Part:
    """One split of the pickle."""

    def __init__(self, found: Found, name: str, split: Split, part: dict[str, Any]) -> None:
        self.found, self.name, self.split = found, name, split
        self.where = f"{found.source}, {name}"
        wanted = found.options.label
        known = [wanted] if wanted else [label for label in LABELS if label in part]
        if not known or known[0] not in part:
            raise UserError(self.where, f"has no {wanted or LABELS[0]}", f"Say which: --label; it has {_list(part)}")
        self.label = known[0]
        self.columns = {column: values for column, values in part.items() if isinstance(values, np.ndarray | list)}
        if self.label not in self.columns:
            raise UserError(f"{self.where}, {self.label}", "is no array", "Name another column with --label")
        self.count = len(self.columns[self.label]) if _ranked(self.columns[self.label]) else 0
        for column, values in list(self.columns.items()):
            if _ranked(values) and len(values) == self.count:
                continue
            if column in ("id", "raw_text", *STREAMS.values()) or column.endswith("_lengths"):
                size = len(values) if _ranked(values) else 1
                problem = f"has {size} entries, {self.label} has {self.count}"
                raise UserError(f"{self.where}, {column}", problem, "Give a pickle whose columns fit together")
            del self.columns[column]
        self.lengths = {stream: self._lengths(column) for stream, column in STREAMS.items()}

    def read(self) -> Iterator[str]:
        """Adds the clips; tells what was done to them."""
        if self.count == 0:
            yield "no clips"
        for i in tracked(range(self.count), f"{self.name} clips"):
            self._clip(i)
        if self.count and TOKENS in self.columns:
            yield f"{TOKENS} is left out (token numbers of raw_text)"
        for stream, column in STREAMS.items():
            if self.count and column in self.columns:
                cut = self.lengths[stream] is not None
                yield f"{column} cut to its lengths" if cut else f"{column} has no lengths, its padding is kept"

    def _lengths(self, column: str) -> list[int] | None:
        """Steps of each clip; None where it is not said."""
        said = self.columns.get(f"{column}_lengths")
        if said is not None:
            try:
                return [int(_one(length)) for length in said]
            except (TypeError, ValueError, OverflowError):
                raise UserError(f"{self.where}, {column}_lengths", "holds what is no number", "Repair it") from None
        bert, values = self.columns.get(TOKENS), self.columns.get(column)
        if column != "text" or not isinstance(bert, np.ndarray) or not isinstance(values, np.ndarray):
            return None
        if bert.dtype.kind not in "fiu" or bert.ndim != 3 or values.ndim != 3 or bert.shape[1:] != (3, values.shape[1]):
            return None
        mask = np.nan_to_num(bert[:, 1].astype(np.float64))  # token numbers, mask, segments
        whole = (mask[:, :-1] >= mask[:, 1:]).all() and np.isin(mask, (0, 1)).all()  # ones, then zeros
        return mask.sum(axis=1).astype(int).tolist() if whole else None

    def _clip(self, i: int) -> None:
        name = _identity(self.columns["id"][i]) if "id" in self.columns else f"{self.name}_{i:06d}"
        sources: dict[str, Features | None] = {}
        for stream, column in STREAMS.items():
            try:
                sources[stream] = self._stream(stream, column, i, name)
            except ValueError as error:
                self.found.problem(name, f"{column} {error}", "Repair the pickle, or use --on-bad-sample set_aside")
                return
        extra = {column: _one(values[i]) for column, values in self.columns.items() if self._kept(column)}
        self.found.add(
            name,
            _one(self.columns[self.label][i]),
            self.split,
            self.name,
            text=_words(self.columns["raw_text"][i]) if "raw_text" in self.columns else None,
            extra=extra,
            **sources,
        )

    def _stream(self, stream: str, column: str, i: int, name: str) -> Held | None:
        if column not in self.columns:
            return None
        array = np.asarray(self.columns[column][i])
        if array.ndim == 1 and array.dtype.kind in "fiu":
            array = array[None]  # one vector for the whole clip
        if array.ndim != 2:
            raise ValueError(f"has shape {list(array.shape)}, expected [time, width]")
        lengths = self.lengths[stream]
        if lengths is not None:
            if not 0 <= lengths[i] <= len(array):
                raise ValueError(f"has {len(array)} steps and is said to have {lengths[i]}")
            array = array[: lengths[i]]
        return Held(f"{self.where}, {column} of {name}", array) if len(array) else None

    def _kept(self, column: str) -> bool:
        streams = ("id", "raw_text", self.label, *STREAMS.values())
        return column not in (*streams, TOKENS) and not column.endswith("_lengths")


def _ranked(values: Any) -> bool:
    return isinstance(values, list) or values.ndim > 0


def _list(part: dict[str, Any]) -> str:
    return ", ".join(sorted(part))


def _one(value: Any) -> Any:
    """A number out of an array of one; anything else as it is."""
    return value.reshape(-1)[0].item() if isinstance(value, np.ndarray) and value.size == 1 else value


def _identity(value: Any) -> str:
    """A clip's name; older pickles have [video, begin, end]."""
    return "_".join(_words(value).split()) if isinstance(value, np.ndarray | list | tuple) else _words(value)


def _words(value: Any) -> str:
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if isinstance(value, list | tuple):
        return " ".join(_words(part) for part in value if isinstance(part, str | bytes | int | float))
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
