"""CSV tables of clips, and the sound and film files that belong to them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sharding.errors import UserError, UserErrors
from tools.manifest import FILM_SUFFIXES, Wanted, capped, missing_columns, read_csv, read_text

SOUND_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")


def read_table(path: Path, wanted: Wanted) -> list[dict[str, str]]:
    """The rows by column.

    Raises:
        UserError, UserErrors: it cannot be read, is no CSV, or lacks a column; all at once.
    """
    errors: list[UserError] = []
    rows = [row for _, row in read_csv(path, read_text(path), errors, wanted)]
    errors += missing_columns(path, set(rows[0]), wanted) if rows else []
    if errors:
        raise UserErrors(capped(errors, str(path)))
    return rows


def media_below(folder: Path) -> Iterator[Path]:
    """All sound and film files below a folder; hidden ones are none (macOS writes ._NAME beside NAME)."""
    for place, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            path = Path(place) / name
            if not name.startswith(".") and path.suffix.lower() in (*SOUND_SUFFIXES, *FILM_SUFFIXES) and path.is_file():
                yield path


def choose(paths: list[Path], film: bool) -> Path | None:
    """Which file of a clip to take: where there are both, a film if pictures are asked for, else a sound file."""
    order = (FILM_SUFFIXES, SOUND_SUFFIXES) if film else (SOUND_SUFFIXES, FILM_SUFFIXES)
    ranked = sorted(paths, key=lambda path: (path.suffix.lower() in order[1], path))
    return ranked[0] if ranked else None


def class_or_number(value: Any) -> bool:
    """Whether it is a number, or text that is one."""
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def refuse_classes(values: list[Any], where: str) -> None:
    """Classes that nobody has given numbers.

    Raises:
        UserError: there are some; lists them and how to give them numbers.
    """
    classes = sorted({str(value) for value in values if not class_or_number(value)})
    if not classes:
        return
    example = {"positive": 1, "neutral": 0, "negative": -1}
    if "positive" not in classes:
        example = dict(zip(classes, (-1, 1), strict=False))
    told = ",".join(f"{name}={number}" for name, number in example.items())
    raise UserError(
        where,
        f"holds classes ({', '.join(classes[:20])}), which have no numbers",
        f"Name them, e.g. --classes {','.join(classes[:20])} for task: classification, or say which number each is for "
        f"regression, e.g. --labels {told}; nothing is assumed",
    )
