"""The index of one split as arrays: opened at once, whatever its size.

`TAR.index.json` is the index. SPLIT.columns.safetensors, written beside it, repeats the rows of all indexes of a split
as arrays in key order, each with its CRC-32, and says of which tars and indexes it was made. Opening a split takes it
instead of the indexes while it is whole and they are of the sizes it knows; damaged, outdated or absent it costs time
and nothing else: the indexes are read. `dist-train shards verify` compares both.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload
from zlib import crc32

import numpy as np
import safetensors
import safetensors.numpy

from sharding.shards import Columns, DatasetInfo, ShardIndex, SplitInfo, load_dataset, load_info

PLACES = ("tar", "offset", "size", "sha256", "label")
LENGTHS = ("audio_seconds", "audio_frames", "text_characters", "text_frames", "simulated_frames", "vision_frames")


class Keys(Sequence[str]):
    """Names of samples, held as one string of UTF-8 bytes.

    Args:
        text: uint8, all names one behind the other.
        ends: int64 [n], where each ends.
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, keys: Sequence[str]) -> Keys:
        """Packs names."""
        encoded = [key.encode() for key in keys]
        text = np.frombuffer(b"".join(encoded), np.uint8)
        return cls(text, np.cumsum([len(one) for one in encoded], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"key {index} of {len(self)}")
        index %= len(self)
        start = self.ends[index - 1] if index else 0
        return self.text[start : self.ends[index]].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        text, start = self.text.tobytes(), 0
        for end in self.ends.tolist():
            yield text[start:end].decode()
            start = end

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


class Lengths(Sequence["float | int | None"]):
    """A column of lengths, None where the modality is absent.

    Args:
        values: float64 [n], NaN where absent.
        whole: they are counts.
    """

    def __init__(self, values: np.ndarray, *, whole: bool) -> None:
        self.values, self.whole = values, whole

    @classmethod
    def of(cls, values: Sequence[float | int | None], *, whole: bool) -> Lengths:
        """Packs lengths."""
        return cls(np.array([np.nan if value is None else value for value in values], np.float64), whole=whole)

    def filled(self) -> np.ndarray:
        """float64 [n], 0 where absent."""
        return np.nan_to_num(self.values)

    @property
    def present(self) -> bool:
        """Whether any sample has the modality."""
        return not bool(np.isnan(self.values).all())

    def packed(self) -> np.ndarray:
        """For a file: counts as int32, -1 where absent, if that holds them."""
        if self.whole and np.nanmin(self.values) >= 0 and np.nanmax(self.values) < 2**31:
            return np.nan_to_num(self.values, nan=-1).astype(np.int32)
        return self.values

    @classmethod
    def unpacked(cls, packed: np.ndarray | None, name: str, n: int) -> Lengths:
        """The inverse of `packed`, of the column `name` of n samples; None: all are absent."""
        values = np.full(n, np.nan) if packed is None else packed
        if values.dtype != np.float64:
            values = np.where(values < 0, np.nan, values)
        return cls(values, whole=name != "audio_seconds")

    def __len__(self) -> int:
        return len(self.values)

    @overload
    def __getitem__(self, index: int) -> float | int | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[float | int | None]: ...
    def __getitem__(self, index: int | slice) -> float | int | list[float | int | None] | None:
        if isinstance(index, slice):
            return list(Lengths(self.values[index], whole=self.whole))
        value = self.values[index]
        return None if np.isnan(value) else int(value) if self.whole else float(value)

    def __iter__(self) -> Iterator[float | int | None]:
        number = int if self.whole else float
        return (None if value != value else number(value) for value in self.values.tolist())  # noqa: PLR0124  NaN

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class Table:
    """One split's samples in key order; the columns are those of `shards.Columns`.

    Args:
        tars: paths of the tars (text: a large dataset has thousands).
        tar: int32 [n], in which of them a sample lies.
        key: names.
        offset, size: int64 [n], byte ranges.
        sha256: uint8 [n, 32].
        label: float64 [n].
        audio_seconds, audio_frames, text_characters, text_frames, simulated_frames, vision_frames: lengths.
    """

    tars: list[str]
    tar: np.ndarray
    key: Keys
    offset: np.ndarray
    size: np.ndarray
    sha256: np.ndarray
    label: np.ndarray
    audio_seconds: Lengths
    audio_frames: Lengths
    text_characters: Lengths
    text_frames: Lengths
    simulated_frames: Lengths
    vision_frames: Lengths

    def __len__(self) -> int:
        return len(self.label)

    def equals(self, other: Table) -> bool:
        """Whether all rows are the same."""
        pairs = [(getattr(self, name), getattr(other, name)) for name in PLACES]
        pairs += [(getattr(self, name).values, getattr(other, name).values) for name in LENGTHS]
        pairs += [(self.key.text, other.key.text), (self.key.ends, other.key.ends)]
        return self.tars == other.tars and all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in pairs)

    @property
    def in_order(self) -> bool:
        """Whether neighbours in key order are neighbours on the disk too."""
        same = self.tar[1:] == self.tar[:-1]
        return bool((self.offset[1:] >= self.offset[:-1])[same].all()) and int((~same).sum()) + 1 == len(self.tars)


def filled(column: Sequence[float | int | None]) -> np.ndarray:
    """float64 [n]: a column of lengths, 0 where the modality is absent."""
    return column.filled() if isinstance(column, Lengths) else np.array([value or 0.0 for value in column])


def open_table(root: Path, split: str) -> tuple[DatasetInfo, Table]:
    """dataset.json and one split's index.

    Raises:
        UserError, UserErrors: see `shards.load_dataset`.
    """
    info = load_info(root)
    if split in info.splits:
        table = read_columns(root, split, info.splits[split])
        if table is not None:
            return info, table
    dataset = load_dataset(root, split)
    return dataset.info, table_of(root, dataset.indexes[split])


def table_of(root: Path, indexes: Sequence[ShardIndex]) -> Table:
    """The rows of a split's indexes in key order."""
    every = {name: [v for index in indexes for v in getattr(index.columns, name)] for name in Columns.model_fields}
    order = np.array(sorted(range(len(every["key"])), key=every["key"].__getitem__), np.int64)
    tar = np.repeat(np.arange(len(indexes), dtype=np.int32), [len(index.columns.key) for index in indexes])
    digests = np.frombuffer(bytes.fromhex("".join(every["sha256"])), np.uint8).reshape(-1, 32)
    return Table(
        tars=[f"{root}/{index.tar}" for index in indexes],
        tar=tar[order],
        key=Keys.of([every["key"][i] for i in order]),
        offset=np.array(every["offset"], np.int64)[order],
        size=np.array(every["size"], np.int64)[order],
        sha256=digests[order],
        label=np.array(every["label"], np.float64)[order],
        **{name: Lengths.of([every[name][i] for i in order], whole=name != "audio_seconds") for name in LENGTHS},
    )


def write_columns(root: Path, split: str, indexes: Sequence[ShardIndex]) -> None:
    """Writes SPLIT.columns.safetensors beside the indexes, which are there already; equal indexes give equal bytes.

    Not where a key is there twice: whoever opens the split must be told, which reading the indexes does.

    Raises:
        OSError: the disk refuses it.
    """
    table = table_of(root, indexes)
    if len(set(table.key)) < len(table):
        return
    arrays = {"key": table.key.text, "key_ends": table.key.ends}
    arrays |= {name: getattr(table, name) for name in PLACES}
    arrays |= {name: getattr(table, name).packed() for name in LENGTHS if getattr(table, name).present}
    tars = {index.tar: [index.bytes, index.sha256, _size_of_index(root, index.tar)] for index in indexes}
    origin = json.dumps({"tars": tars, "arrays": {name: crc32(array.data) for name, array in sorted(arrays.items())}})
    with columns_path(root, split).open("wb") as stream:
        stream.write(safetensors.numpy.save(arrays, {"origin": origin}))
        stream.flush()
        os.fsync(stream.fileno())


def read_columns(root: Path, split: str, part: SplitInfo) -> Table | None:
    """The table in SPLIT.columns.safetensors if it is whole and of these very tars and indexes, else None."""
    try:
        with safetensors.safe_open(columns_path(root, split), framework="np") as file:
            origin = json.loads(file.metadata()["origin"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        tars = {e.file: [e.bytes, e.sha256, _size_of_index(root, e.file)] for e in part.shards}
        files = [f"{root}/{entry.file}" for entry in part.shards]
        sizes = [os.stat(file).st_size for file in files]  # noqa: PTH116  Path is slow where there are thousands
        counts = np.bincount(arrays["tar"], minlength=len(tars)).tolist()
        same = (
            list(origin["tars"].items()) == list(tars.items())
            and origin["arrays"] == {name: crc32(array.data) for name, array in arrays.items()}
            and sizes == [entry.bytes for entry in part.shards]
            and counts == [entry.samples for entry in part.shards]
        )
        if not same:
            return None
        columns: dict[str, Any] = {name: arrays[name] for name in PLACES}
        columns |= {name: Lengths.unpacked(arrays.get(name), name, len(arrays["tar"])) for name in LENGTHS}
        columns["key"] = Keys(arrays["key"], arrays["key_ends"])
        return Table(files, **columns)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError):
        return None


def _size_of_index(root: Path, tar: str) -> int:
    return os.stat(f"{root}/{tar}.index.json").st_size  # noqa: PTH116


def columns_path(root: Path, split: str) -> Path:
    """Where a split's columns lie."""
    return root / f"{split}.columns.safetensors"
