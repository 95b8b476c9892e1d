"""MERBench's layout, which SDUMC uses too: one label .npz, and a folder of .npy files for each feature.

Source: github zeroQiaoba/MERTools, MERBench/toolkit. A label file holds train_corpus, val_corpus, test_corpus (or
test1_corpus …), each {clip: {"emo": …, "val": …}}; features are FEATURE/CLIP.npy, [T, D] or [D], or a folder
FEATURE/CLIP of one .npy per frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sharding.errors import UserError, UserErrors
from sharding.npy import read_npy, read_shape
from tools.imports.found import Found
from tools.imports.numpy_pickle import load_archive
from tools.imports.splits import match_splits, read_split_file
from tools.imports.tables import read_table, refuse_classes
from tools.progress import tracked
from tools.sources import Features

ROLES = ("audio", "text", "vision")
LANGUAGES = ("english", "sentence", "text", "chinese")  # columns of a transcript, the first that is there
NO_VALENCE = -10  # written where a corpus has no valence


@dataclass(frozen=True)
class ClipFeature(Features):
    """CLIP.npy, or a folder of one .npy per frame in the order of their names."""

    path: Path

    @property
    def width(self) -> int | None:
        try:
            first = next(iter(self._files()), None)
            if first is None:
                return None
            with first.open("rb") as file:
                shape = read_shape(file, first.stat().st_size)
        except (OSError, ValueError):
            return None
        return shape[-1] or None if shape else None

    def read(self) -> np.ndarray:
        steps = []
        for path in self._files():
            with path.open("rb") as file:
                try:
                    array = read_npy(file, path.stat().st_size)
                except ValueError as error:
                    raise ValueError(str(error) if path == self.path else f"holds {path.name}, which {error}") from None
            if array.ndim not in (1, 2) or (path != self.path and array.size != array.shape[-1]):
                raise ValueError(f"holds {path.name} of shape {list(array.shape)}")
            steps.append(np.atleast_2d(array))
        widths = {array.shape[1] for array in steps}
        if len(widths) > 1:
            raise ValueError(f"holds frames of several widths ({', '.join(map(str, sorted(widths)))})")
        return np.concatenate(steps) if steps else np.zeros((0, 1))

    def _files(self) -> list[Path]:
        return (
            [self.path]
            if self.path.suffix == ".npy"
            else sorted(path for path in self.path.glob("*.npy") if path.is_file())
        )

    def __str__(self) -> str:
        return str(self.path)


def read(found: Found) -> None:
    """Adds the clips of a label file with their features.

    Raises:
        UserError, UserErrors: a label file or folder that is missing, damaged, or not named.
    """
    file = _label_file(found.source)
    corpora = {name.removesuffix("_corpus"): held for name, held in load_archive(file).items()}
    folders = _feature_folders(found, file.parent)
    texts = _transcripts(found, file.parent)
    chosen = found.options.split_from
    by_clip = None if chosen is None else read_split_file(chosen)
    splits = {} if by_clip is not None else match_splits(corpora, found.options.splits, str(file))
    field = found.options.label or "val"
    seen: set[str] = set()
    clips = list(_clips(corpora, file))
    if found.options.labels is None and not found.classes:
        told = [held.get(field) for _, _, held in clips if isinstance(held, dict)]
        refuse_classes([value for value in told if isinstance(value, str)], f"{file}, field {field}")
    for corpus, name, held in tracked(clips, "clips"):
        split = splits.get(corpus) if by_clip is None else by_clip.get(name)
        if split is None:
            found.leave_out(name, f"{corpus}_corpus is no split" if by_clip is None else f"not in {chosen}")
            continue
        seen.add(name)
        if not isinstance(held, dict) or field not in held:
            found.problem(name, f"has no {field!r} in {corpus}_corpus", "Say which field: --label NAME")
            continue
        if not name or Path(name).name != name:
            found.problem(name, "is no file name", "Rename it in the label file")
            continue
        if isinstance(held[field], int | float | np.number) and held[field] == NO_VALENCE:
            found.problem(
                name, f"has {field} {NO_VALENCE}, which stands for no label", "Leave it out of the label file"
            )
            continue
        sources = {role: _feature(folder, name) for role, folder in folders.items()}
        found.add(
            name,
            held[field],
            split,
            f"{corpus}_corpus",
            audio=sources.get("audio"),
            text=texts.get(name),
            text_features=sources.get("text"),
            vision=sources.get("vision"),
            extra={key: value for key, value in held.items() if key != field},
        )
    for role, folder in folders.items():
        for entry in sorted(path.name for path in folder.iterdir()):
            if entry.removesuffix(".npy") not in seen:
                found.leave_out(f"{role}: {entry}", f"{role} features without a labelled clip")


def _label_file(source: Path) -> Path:
    if source.is_file():
        return source
    files = sorted(source.glob("*.npz")) if source.is_dir() else []
    if len(files) == 1:
        return files[0]
    problem = f"holds {len(files)} .npz files, of which one is to be the labels" if source.is_dir() else "is missing"
    remedy = f"Name one of {', '.join(file.name for file in files)}" if files else "Name the label .npz, or its folder"
    raise UserError(str(source), problem, remedy)


def _feature_folders(found: Found, root: Path) -> dict[str, Path]:
    """Folder of each role: as named, in `features` or beside the labels; without names those called as the roles."""
    named = {role: getattr(found.options, role) for role in ROLES}
    if not any(named.values()):
        named = {role: role for role in ROLES if (root / role).is_dir() or (root / "features" / role).is_dir()}
    folders, errors = {}, []
    there = sorted(
        path.name for base in (root / "features", root) if base.is_dir() for path in base.iterdir() if path.is_dir()
    )
    for role, name in named.items():
        if name is None:
            continue
        places = [place for place in (root / "features" / name, root / name, Path(name)) if place.is_dir()]
        if places:
            folders[role] = places[0]
        else:
            remedy = f"Folders found: {', '.join(there) or 'none'}"
            errors.append(
                UserError(f"--{role}", f"there is no folder {name!r} in {root} or {root / 'features'}", remedy)
            )
    if not named:
        remedy = f"Write --audio, --text, --vision with a folder each; found: {', '.join(there) or 'none'}"
        errors.append(UserError(str(root), "which folders hold the features is not said", remedy))
    if errors:
        raise UserErrors(errors)
    return folders


def _feature(folder: Path, clip: str) -> ClipFeature | None:
    file, frames = folder / f"{clip}.npy", folder / clip
    return ClipFeature(file) if file.is_file() else ClipFeature(frames) if frames.is_dir() else None


def _clips(corpora: dict[str, Any], file: Path) -> Iterator[tuple[str, str, Any]]:
    for corpus, held in corpora.items():
        if not isinstance(held, dict):
            raise UserError(f"{file}, {corpus}", "is no dict of clips", "Give a label file of MERBench")
        for name, one in held.items():
            yield corpus, str(name), one


def _transcripts(found: Found, root: Path) -> dict[str, str]:
    """Transcript of each clip from a CSV with columns name and english (or sentence, text, chinese)."""
    if found.options.transcript is None:
        return {}
    path = root / found.options.transcript
    rows = read_table(path, ("name", LANGUAGES))
    column = next((name for name in LANGUAGES if rows and name in rows[0]), LANGUAGES[0])
    found.remark(f"Transcripts: column {column!r} of {path.name}")
    return {row["name"].strip(): row[column] for row in rows}
