"""Reads a corpus manifest (CSV or JSON lines) and reports everything that is wrong with it in one pass."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from sharding.errors import UserError, UserErrors
from sharding.files import read_bounded
from sharding.shards import LARGEST_LABEL, LONGEST_KEY, Split, class_problems
from tools.sources import Features, Media

REQUIRED = ("key", "label", "split")
FILES = ("audio", "text_features", "simulated", "vision")
MODALITIES = ("audio", "text", "text_features", "simulated", "vision")
FILM_SUFFIXES = (".mp4", ".mkv", ".avi", ".mov", ".webm")
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".npy", *FILM_SUFFIXES)
COLUMNS = (*REQUIRED, MODALITIES)
Wanted = tuple[str | tuple[str, ...], ...]  # columns of a table
LONG_TEXT = 8000  # characters, about the 2048-token context of Llama
LONGEST_TEXT = 1_000_000  # characters, about what is said in 20 hours: another file, or a quote that never ends
MOST_BYTES = 1 << 30  # of a manifest, about ten million lines; it is read as a whole
MOST_ERRORS = 50
SHOWN_CLASSES, SHOWN_LABEL = 12, 60  # in a message: how many, and characters


@dataclass(frozen=True)
class Row:
    """One sample; paths are absolute or relative to the working directory, None where the modality is absent.

    `audio` is a sound file, a film whose sound track is taken, or features.
    """

    key: str
    label: float
    split: Split
    audio: Path | Media | Features | None
    text: str | None
    text_features: Path | Features | None
    vision: Path | Features | None
    simulated: Path | Features | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """The rows in file order, and what else is to be said of the corpus."""

    rows: list[Row]
    notes: list[str]  # remarks that are no errors (very long texts)
    remarks: list[str] = field(default_factory=list)  # of an importer, for the summary
    problems: list[tuple[str, UserError]] = field(default_factory=list)  # by key, of samples that could not become rows
    record: dict[str, Any] | None = None  # of an importer: what becomes import.json beside the tars


def read_manifest(path: Path, label_range: tuple[float, float] = (-3.0, 3.0), classes: Sequence[str] = ()) -> Manifest:
    """Read and check a manifest.

    Columns: key, label, split (train, valid, test), and at least one of audio (wav, flac, ogg, mp3, a film, or .npy
    features [T, D]), text (transcript), text_features (.npy), simulated (.npy: features of imagined text), vision
    (.npy). Paths are relative to the manifest. Other columns are kept. Any modality may be empty, not all of them.

    Args:
        path: CSV with a header, or one JSON object per line (.jsonl, .ndjson); UTF-8.
        label_range: smallest and largest label allowed.
        classes: names, where labels are classes: a label is then one of them, or its place in this list from 0.

    Raises:
        UserErrors: all problems found, at most MOST_ERRORS of them written out.
    """
    check_classes(classes)
    check_label_range(label_range)
    text = read_text(path)
    jsonl = path.suffix.lower() in (".jsonl", ".ndjson", ".json")
    errors: list[UserError] = []
    cells = list(_read_jsonl(path, text, errors) if jsonl else read_csv(path, text, errors, COLUMNS))
    columns = {column for _, row in cells for column in row}
    errors = missing_columns(path, columns, COLUMNS) + errors if cells else errors
    if not cells and not errors:
        errors.append(UserError(str(path), "has no rows", "Write one row per clip"))

    rows = []
    for line, row in cells:
        found = _check_row(f"{path}:{line}", row, columns, path.parent, label_range, classes)
        errors.extend(found[1])
        if found[0] is not None:
            rows.append(found[0])
    errors.extend(_duplicates(path, cells))
    if errors:
        raise UserErrors(capped(errors, str(path)))
    return Manifest(rows, long_texts(rows))


def check_classes(classes: Sequence[str]) -> None:
    """Raise UserErrors unless there are none, or they can be told apart and shown."""
    errors = [UserError("--classes", *told) for told in class_problems(classes)] if classes else []
    if errors:
        raise UserErrors(errors)


def check_label_range(label_range: tuple[float, float]) -> None:
    """Raise UserError unless it goes upwards and is far from the end of fp32."""
    if not label_range[0] < label_range[1]:
        raise UserError("label range", f"{label_range[0]} is not below {label_range[1]}", "Give MIN before MAX")
    if max(map(abs, label_range)) > LARGEST_LABEL:
        raise UserError("label range", f"{label_range} goes beyond ±{LARGEST_LABEL:g}", "Scale the labels down")


def long_texts(rows: list[Row]) -> list[str]:
    """A remark for each transcript that the language model may cut."""
    return [
        f"{row.key}: text of {len(row.text)} characters; the language model may cut it"
        for row in rows
        if row.text and len(row.text) > LONG_TEXT
    ]


def capped(errors: list[UserError], where: str) -> list[UserError]:
    """The first MOST_ERRORS errors, and one that counts the rest."""
    rest = len(errors) - MOST_ERRORS
    more = [UserError(where, f"{rest} more errors like these", "Fix the first ones and run again")]
    return errors if rest <= 0 else errors[:MOST_ERRORS] + more


def read_text(path: Path) -> str:
    """A manifest or another table.

    Raises:
        UserError, UserErrors: it cannot be read, is too large, or is no UTF-8; names every such line.
    """
    try:
        data = read_bounded(path, MOST_BYTES, "Name a CSV or JSONL manifest")
    except OSError as error:
        raise UserError(str(path), f"cannot be read ({error.strerror})", "Name a CSV or JSONL manifest") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    errors = []
    for number, line in enumerate(data.split(b"\n"), 1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            problem = f"byte {error.start + 1} of the line (0x{line[error.start]:02x}) is not valid UTF-8"
            errors.append(UserError(f"{path}:{number}", problem, "Save the manifest as UTF-8"))
    raise UserErrors(capped(errors, str(path)))


def read_csv(path: Path, text: str, errors: list[UserError], wanted: Wanted) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line and cells by column of each row; adds what is wrong to `errors`.

    Args:
        wanted: see `missing_columns`. A table that has none of them is taken for one without header.
    """
    csv.field_size_limit(sys.maxsize)  # the default refuses transcripts beyond 131,072 characters
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        for name, count in Counter(header).items():
            if count > 1:
                errors.append(UserError(f"{path}:1", f"column {name!r} stands {count} times", "Keep one"))
        if not {one for one in wanted if isinstance(one, str)} & set(header):
            errors.extend(missing_columns(path, set(header), wanted))
            return
        line = reader.line_num + 1
        for cells in reader:
            if len(cells) == len(header):
                yield line, dict(zip(header, cells, strict=True))
            elif cells:
                problem = f"{len(cells)} cells under {len(header)} columns"
                errors.append(UserError(f"{path}:{line}", problem, 'Put text with commas between double quotes ("…")'))
            line = reader.line_num + 1
    except csv.Error as error:
        errors.append(UserError(f"{path}:{reader.line_num}", f"is not valid CSV ({error})", "Check the quotes"))


def _read_jsonl(path: Path, text: str, errors: list[UserError]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            # NaN and Infinity stay visible as text.
            row = json.loads(line, parse_constant=str, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            errors.append(UserError(f"{path}:{number}", f"is not valid JSON ({error})", "Write one object per line"))
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            errors.append(UserError(f"{path}:{number}", "is not a JSON object", "Write one object per line"))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; the last of equal fields would win without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"field {twice!r} stands twice")
    return found


def missing_columns(path: Path, columns: set[str], wanted: Wanted) -> list[UserError]:
    """An error for each column that a table lacks; of columns in a tuple it must have one."""
    remedy = f"Columns found: {', '.join(sorted(columns)) or 'none'}"
    told = [
        f"has no column {one!r}" if isinstance(one, str) else f"has none of the columns {', '.join(one)}"
        for one in wanted
        if not columns & ({one} if isinstance(one, str) else set(one))
    ]
    return [UserError(str(path), problem, remedy) for problem in told]


def _duplicates(path: Path, cells: list[tuple[int, dict[str, Any]]]) -> list[UserError]:
    lines: dict[str, list[int]] = {}
    for line, row in cells:
        lines.setdefault(str(row.get("key") or "").strip(), []).append(line)
    return [
        UserError(f"{path}:{found[1]}", f"key {key!r} stands on lines {', '.join(map(str, found))}", "Make keys unique")
        for key, found in lines.items()
        if key and len(found) > 1
    ]


def _check_row(
    where: str,
    cells: dict[str, Any],
    columns: set[str],
    folder: Path,
    label_range: tuple[float, float],
    classes: Sequence[str],
) -> tuple[Row | None, list[UserError]]:
    """The row, or None, and what is wrong with it."""
    values = {name: _cell(cells.get(name)) for name in (*REQUIRED, *MODALITIES)}
    problems = [
        (f"{name} holds a {type(cells[name]).__name__}", "Write a string")
        for name in values
        if not isinstance(cells.get(name), str | int | float | None)
    ]
    if values["text"] and not encodes(values["text"]):
        problems.append(("text holds half a surrogate pair", "Write the whole character"))
    key = values["key"] or ""
    if len(values["text"] or "") > LONGEST_TEXT:
        problems.append((f"text of {len(values['text'] or '')} characters", f"Write at most {LONGEST_TEXT}"))
    if "key" in columns:
        problems += check_key(key)
    label = math.nan
    if "label" in columns:
        label, found = check_label(cells.get("label"), label_range, classes)
        problems += found
    split = values["split"] or ""
    if "split" in columns and split not in get_args(Split):
        known = get_args(Split)
        near = get_close_matches(split.lower(), [*known, "val", "dev"], n=1)
        meant = {"val": "valid", "dev": "valid"}.get(near[0], near[0]) if near else None
        problems.append(
            (f"unknown split {split!r}", f"Write {meant!r}" if meant else f"Write one of {', '.join(known)}")
        )
    paths: dict[str, Path | None] = {}
    for name in FILES:
        value = values[name]
        paths[name] = None if value is None else folder / value
        if value is not None:
            problems += _check_file(name, folder / value)
    if columns & set(MODALITIES) and not any(values[name] for name in MODALITIES):
        problems.append(("has no modality at all", "Fill audio, text, text_features or vision, or remove the row"))
    where = f"{where} ({key})" if key and key.isprintable() else where
    errors = [UserError(where, *problem) for problem in problems]
    if errors or not set(REQUIRED) <= columns:
        return None, errors
    extra = {name: value for name, value in cells.items() if name not in values}
    return Row(key, label, split, text=values["text"], extra=extra, **paths), []  # type: ignore[arg-type]  # split checked


def _cell(value: Any) -> str | None:
    """A cell without outer white space; None where empty."""
    return str(value).strip() or None if isinstance(value, str | int | float) else None


def encodes(text: str) -> bool:
    """Whether it is text that UTF-8 can write."""
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone \ud800 in JSON
        return False
    return True


def check_key(key: str) -> list[tuple[str, str]]:
    """What is wrong with a sample's name, and what to do."""
    if not key:
        return [("key is empty", "Give every clip a name")]
    if len(key) > LONGEST_KEY:
        return [(f"key of {len(key)} characters", f"Write at most {LONGEST_KEY}")]
    bad = sorted({character for character in key if character in "./" or not character.isprintable()})
    names = ", ".join(map(repr, bad))
    # WebDataset takes what follows the first dot as the file's kind, and "/" as a folder.
    return (
        [(f"key {key!r} holds {names}, which a shard cannot name", "Use letters, digits, '_' and '-'")] if bad else []
    )


def check_label(
    value: Any, label_range: tuple[float, float], classes: Sequence[str] = ()
) -> tuple[float, list[tuple[str, str]]]:
    """The label (NaN where it is none), and what is wrong with it. A class is told by its name, or by its place."""
    if classes:
        return check_class(value, classes)
    remedy = f"Write a number from {label_range[0]:g} to {label_range[1]:g} (or change --label-range)"
    try:
        label = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        label = math.nan
    if math.isnan(label):
        return label, [(f"label {shown(value)} is not a number", remedy)]
    if not label_range[0] <= label <= label_range[1]:
        return label, [(f"label {label:g} is outside {label_range[0]:g} … {label_range[1]:g}", remedy)]
    return label, []


def check_class(value: Any, classes: Sequence[str]) -> tuple[float, list[tuple[str, str]]]:
    """The place of a class (NaN where it is none), and what is wrong with it."""
    name = value.strip() if isinstance(value, str) else value
    if isinstance(name, str) and name in classes:
        return float(classes.index(name)), []
    try:
        place = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        place = math.nan
    if place in range(len(classes)):
        return place, []
    known = ", ".join(classes[:SHOWN_CLASSES]) + (", …" if len(classes) > SHOWN_CLASSES else "")
    remedy = f"Write one of {known}, or its place from 0 to {len(classes) - 1} (or change --classes)"
    return math.nan, [(f"label {shown(value)} is no class", remedy)]


def shown(value: Any) -> str:
    """A wrong label in a message."""
    text = repr(value)
    return text if len(text) <= SHOWN_LABEL else f"{text[:SHOWN_LABEL]}…"


def _check_file(name: str, path: Path) -> list[tuple[str, str]]:
    allowed = AUDIO_SUFFIXES if name == "audio" else (".npy",)
    if path.suffix.lower() not in allowed:
        return [(f"{name} file {path} is not of a known kind", f"Use {', '.join(allowed)}")]
    try:
        if path.exists() and not path.is_file():  # a FIFO would never begin, a device never end
            return [(f"{name} file {path} is not a regular file", "Correct the path (relative to the manifest)")]
        if not path.is_file():
            return [(f"{name} file {path} is missing", "Correct the path (relative to the manifest) or leave it empty")]
    except (OSError, ValueError) as error:  # name too long, NUL byte
        return [(f"{name} file name cannot be used ({error})", "Correct the path")]
    return []
