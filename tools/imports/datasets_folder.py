"""A folder that Hugging Face `datasets` wrote with save_to_disk. Its Arrow files are read; no script is ever run."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sharding.errors import UserError, UserErrors, collected
from sharding.shards import Split
from tools.imports.found import Found
from tools.imports.packages import need
from tools.imports.splits import match_splits, our_split, read_split_file
from tools.imports.tables import refuse_classes
from tools.progress import tracked
from tools.sources import Features, Media

# Names that columns commonly have; without --transcript, --label, … the first that is there and of a fitting type.
TRANSCRIPTS = ("transcript", "transcription", "text", "sentence", "raw_text", "utterance")
LABELS = ("label", "labels", "valence", "sentiment", "score", "regression_labels")
KEYS = ("key", "id", "clip", "name", "file_name", "utterance_id", "segment_id")
WHAT = "reading a folder of Hugging Face datasets"


@dataclass(frozen=True)
class Cell:
    """One value: column `column` of row `row`."""

    folder: Path
    split: str | None  # None: the folder is a single dataset
    row: int
    column: str

    def value(self) -> Any:
        """What the Arrow file holds, sounds and films undecoded.

        Raises:
            ValueError: it cannot be read.
        """
        held = _open(self.folder)
        part = held if self.split is None else held[self.split]
        try:
            return part.data.column(self.column)[self.row].as_py()
        except Exception as error:  # pyarrow and datasets raise many kinds for damaged files
            raise ValueError(f"cannot be read ({_reason(error)})") from None

    def __str__(self) -> str:
        place = self.folder if self.split is None else self.folder / self.split
        return f"{place}, row {self.row}, column {self.column}"


@dataclass(frozen=True)
class MediaCell(Media):
    """A sound or film in a column of type Audio or Video."""

    cell: Cell
    film: bool

    @property
    def is_film(self) -> bool:
        return self.film

    def open(self) -> BinaryIO:
        held = self.cell.value()
        data, path = held.get("bytes"), held.get("path")
        if data is not None:
            return io.BytesIO(data)
        if not path or not (self.cell.folder / path).is_file():
            raise ValueError(f"holds no bytes, and {path or 'nothing'} is no file")
        return (self.cell.folder / path).open("rb")

    def __str__(self) -> str:
        return str(self.cell)


@dataclass(frozen=True)
class FeatureCell(Features):
    """Features [T, D], or one vector [D], in a column of lists or arrays."""

    cell: Cell

    @property
    def width(self) -> int | None:
        try:
            return self.read().shape[1]
        except ValueError:
            return None

    def read(self) -> np.ndarray:
        try:
            array = np.asarray(self.cell.value(), np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"is no array of numbers ({_reason(error)})") from None
        if array.ndim not in (1, 2):
            raise ValueError(f"has shape {list(array.shape)}, expected [time, width]")
        return np.atleast_2d(array)

    def __str__(self) -> str:
        return str(self.cell)


def read(found: Found) -> None:
    """Adds the rows of a dataset, or of the splits of a DatasetDict.

    Raises:
        UserError, UserErrors: no such folder, columns that are not said or not there, classes without numbers.
    """
    datasets = need("datasets", WHAT)
    _open.cache_clear()  # the folder may be another than at the last import of this process
    held = _open(found.source)
    parts: dict[Any, Any] = dict(held) if isinstance(held, datasets.DatasetDict) else {None: held}
    splits: dict[Any, Split | None] = {}
    by_name = None if found.options.split_from is None else read_split_file(found.options.split_from)
    if by_name is None and None in parts:
        ours = our_split(str(held.split or ""))
        if ours is None:
            remedy = "Give --split-from FILE, or save a DatasetDict with train, validation and test"
            raise UserError(str(found.source), "is a single dataset that does not say what split it is", remedy)
        splits = {None: ours}
    elif by_name is None:
        splits = dict(match_splits(list(parts), found.options.splits, str(found.source)))
    errors: list[UserError] = []
    for name, part in parts.items():
        if by_name is None and name not in splits:
            found.leave_out(str(name), "no split")
            continue
        with collected(errors):
            _Part(found, name, part).read(splits.get(name), by_name)
    if errors:
        raise UserErrors(errors)


class _Part:
    """One dataset of the folder."""

    def __init__(self, found: Found, name: str | None, part: Any) -> None:
        datasets = need("datasets", WHAT)
        self.found, self.name, self.part = found, name, part
        self.types = part.features
        options = found.options
        values = {column: kind.dtype for column, kind in self.types.items() if isinstance(kind, datasets.Value)}
        films = [column for column, kind in self.types.items() if isinstance(kind, datasets.Video)]
        sounds = [column for column, kind in self.types.items() if isinstance(kind, datasets.Audio)]
        words = [column for column, kind in values.items() if kind in ("string", "large_string")]
        classes = [column for column, kind in self.types.items() if isinstance(kind, datasets.ClassLabel)]
        numbers = [*classes, *(column for column, kind in values.items() if kind.startswith(("float", "int", "uint")))]
        self.media = {*films, *sounds}
        self.films = set(films)
        self.audio = self._column("audio", options.audio, (), sounds or films)
        self.text = self._column("text", options.text, (), [])
        self.vision = self._column("vision", options.vision, (), [])
        self.transcript = self._column("transcript", options.transcript, TRANSCRIPTS, words)
        numbers += words if options.labels is not None or self.found.classes else []
        self.label = self._column("label", options.label, LABELS, numbers)
        if self.label is None:
            raise UserError(
                self._where(), "has no column that is plainly the label", f"Say which: --label; {self._told()}"
            )
        for role, column, fitting in (
            ("transcript", self.transcript, words),
            ("label", self.label, [*numbers, *words]),
        ):
            if column is not None and column not in fitting:
                kind = "words" if role == "transcript" else "a number or class"
                raise UserError(f"--{role}", f"column {column!r} of {self._where()} holds no {kind}", self._told())
        self.key = next((column for column in KEYS if column in words), None)
        self.plain = [*classes, *(column for column, kind in values.items() if "binary" not in kind)]

    def read(self, split: Split | None, by_name: dict[str, Split] | None) -> None:
        """Adds the rows; without `split`, by the split file."""
        assert self.label is not None
        chosen = {"audio": self.audio, "transcript": self.transcript, "text": self.text, "vision": self.vision}
        told = ", ".join(f"{role} {column}" for role, column in {**chosen, "label": self.label}.items() if column)
        self.found.remark(f"{self.name or 'dataset'}: columns taken: {told}; names from {self.key or 'row numbers'}")
        given = sorted(set(self.types) - set(self.plain) - set(chosen.values()))
        if given:
            self.found.remark(f"{self.name or 'dataset'}: columns left out: {', '.join(given)}")
        kind = self.types[self.label]
        names = getattr(kind, "names", None)
        if self.found.options.labels is None and not self.found.classes and names:
            refuse_classes(names, f"{self._where()}, column {self.label}")
        rows = self.part.select_columns(self.plain)
        for i in tracked(range(len(rows)), f"{self.name or 'dataset'} rows"):
            try:
                row = rows[i]
            except Exception as error:  # of pyarrow or datasets
                raise UserError(self._where(), f"row {i} cannot be read ({_reason(error)})", "Save it again") from None
            name = str(row[self.key]) if self.key else f"{self.name or split or 'row'}_{i:06d}"
            to = split if by_name is None else by_name.get(name)
            if to is None:
                self.found.leave_out(name, f"not in {self.found.options.split_from}")
                continue
            label = row[self.label]
            label = names[label] if names and isinstance(label, int) and 0 <= label < len(names) else label
            kept = {column: value for column, value in row.items() if column not in (self.label, self.transcript)}
            self.found.add(
                name,
                label,
                to,
                self.name or "dataset",
                audio=self._source(self.audio, i),
                text=row[self.transcript] if self.transcript else None,
                text_features=self._feature(self.text, i),
                vision=self._feature(self.vision, i),
                extra=kept,
            )

    def _column(self, role: str, named: str | None, common: tuple[str, ...], fitting: list[str]) -> str | None:
        """The column as named, else the first of the common names, else the only one of a fitting type."""
        if named is not None:
            if named not in self.types:
                raise UserError(f"--{role}", f"{self._where()} has no column {named!r}", self._told())
            return named
        usual = [column for column in common if column in fitting]
        if usual:
            return usual[0]
        if role == "audio" and len(fitting) > 1:
            raise UserError(self._where(), f"has several columns of sound ({', '.join(fitting)})", "Say which: --audio")
        return fitting[0] if len(fitting) == 1 else None

    def _source(self, column: str | None, i: int) -> Media | Features | None:
        if column is not None and column in self.media:
            cell = Cell(self.found.source, self.name, i, column)
            return MediaCell(cell, column in self.films) if self._is_there(column, i) else None
        return self._feature(column, i)

    def _feature(self, column: str | None, i: int) -> FeatureCell | None:
        if column is None or not self._is_there(column, i):
            return None
        return FeatureCell(Cell(self.found.source, self.name, i, column))

    def _is_there(self, column: str, i: int) -> bool:
        return self.part.data.column(column)[i].is_valid

    def _where(self) -> str:
        return str(self.found.source if self.name is None else self.found.source / self.name)

    def _told(self) -> str:
        return f"Columns found: {', '.join(self.types)}"


@functools.lru_cache(maxsize=2)
def _open(folder: Path) -> Any:
    """The dataset, sounds, films and pictures left as bytes.

    Raises:
        UserError: it is none, or damaged.
    """
    datasets = need("datasets", WHAT)
    datasets.disable_progress_bars()
    if not folder.is_dir():
        raise UserError(str(folder), "is no folder", "Name a folder written by save_to_disk; nothing is downloaded")
    try:
        held = datasets.load_from_disk(str(folder))
        for kind in (datasets.Audio, datasets.Video, datasets.Image):
            for column in _of_kind(held, kind):
                held = held.cast_column(column, kind(decode=False))
    except Exception as error:  # pyarrow, json and datasets raise many kinds
        remedy = "Name a folder written by save_to_disk (one downloaded from the hub: load it there, then save it)"
        raise UserError(str(folder), f"cannot be loaded ({_reason(error)})", remedy) from None
    return held


def _of_kind(held: Any, kind: Any) -> list[str]:
    parts = held.values() if isinstance(held, dict) else [held]
    return sorted({column for part in parts for column, one in part.features.items() if isinstance(one, kind)})


def _reason(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
