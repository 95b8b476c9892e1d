"""CMU-MultimodalSDK's computational sequences (.csd, HDF5): clips are cut out of videos by the intervals of the labels.

Source: github CMU-MultiComp-Lab/CMU-MultimodalSDK. NAME/data/VIDEO/{features [n, D], intervals [n, 2] in seconds}, and
NAME/metadata. A feature belongs to a clip when the middle of its interval lies in the clip's.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sharding.errors import UserError, UserErrors
from tools.imports.found import Found
from tools.imports.packages import need
from tools.imports.splits import read_split_file
from tools.progress import tracked
from tools.sources import Features

# What the sequences of CMU-MOSI and CMU-MOSEI are, by the beginning of their names, small.
ROLES = {
    "label": ("all labels", "opinion segment labels", "sentiment labels", "emotion labels"),
    "transcript": ("words",),
    "text": ("glove_vectors",),
    "audio": ("covarep", "coavarep", "opensmile"),
    "vision": ("facet", "openface"),
}
SUFFIXES = (".csd", ".hdf5", ".h5")
SILENCE = "sp"  # the word between words
MOST_VALUES = 1 << 27  # of a video in one sequence; half an hour of COVAREP has a tenth of it
FOLDS = "Give --split-from FILE: the SDK's fold file (cmu_mosei_std_folds.py), JSON or CSV"


@dataclass(frozen=True)
class Sequence:
    """A computational sequence in its file."""

    path: Path
    name: str

    def dataset(self, video: str, part: str) -> Any:
        """The HDF5 dataset of a video.

        Raises:
            ValueError: absent, or a link out of the file, or too large.
        """
        group = _hard(_hard(_hard(_open(self.path), self.name), "data"), video)
        data = _hard(group, part)
        if not hasattr(data, "shape") or data.is_virtual or data.external:
            raise ValueError(f"has {part} of {video} that are no numbers of this file")
        if math.prod(data.shape) > MOST_VALUES:
            raise ValueError(f"has {math.prod(data.shape)} values of {video}")
        return data

    def videos(self) -> list[str]:
        """Names of the videos; none where the file is not of this layout."""
        try:
            data = _hard(_hard(_open(self.path), self.name), "data")
        except ValueError:
            return []
        return sorted(data) if hasattr(data, "keys") else []

    def intervals(self, video: str) -> np.ndarray:
        """Begin and end of each feature in seconds, [n, 2].

        Raises:
            ValueError: absent or malformed.
        """
        features, intervals = self.dataset(video, "features"), self.dataset(video, "intervals")
        if features.ndim < 1 or intervals.ndim != 2 or intervals.shape != (features.shape[0], 2):
            raise ValueError(f"has features {list(features.shape)} and intervals {list(intervals.shape)} of {video}")
        found = _read(intervals)
        if found.dtype.kind not in "fiu" or not np.isfinite(found).all():
            raise ValueError(f"has intervals of {video} that are no times")
        return found

    def __str__(self) -> str:
        return f"{self.path}, {self.name}"


@dataclass(frozen=True)
class Cut(Features):
    """The features of a sequence that belong to a clip: rows `begin` to `end` of a video, of them those in `picked`."""

    sequence: Sequence
    video: str
    begin: int
    end: int
    picked: tuple[int, ...] | None  # from `begin`; None: all
    columns: int

    @property
    def width(self) -> int | None:
        return self.columns or None

    def read(self) -> np.ndarray:
        data = self.sequence.dataset(self.video, "features")
        if data.dtype.kind not in "fiu" or data.ndim != 2:
            raise ValueError(f"has features of {self.video} of type {data.dtype} and shape {list(data.shape)}")
        rows = _read(data, slice(self.begin, self.end))
        return rows if self.picked is None else rows[list(self.picked)]

    def __str__(self) -> str:
        return f"{self.sequence}, {self.video}"


def read(found: Found) -> None:
    """Adds a clip for each interval of the labels.

    Raises:
        UserError, UserErrors: no split file, or sequences that are missing, damaged, or not named.
    """
    need("h5py", "reading .csd files")
    _open.cache_clear()  # the files may be others than at the last import of this process
    _names.cache_clear()
    if found.options.split_from is None:
        raise UserError("--split-from", "is missing: .csd files do not say which videos train and test", FOLDS)
    by_name = read_split_file(found.options.split_from)
    sequences = _sequences(found)
    labels = sequences.pop("label")
    for role, sequence in sequences.items():
        found.remark(f"{role}: {sequence.name} of {sequence.path.name}")
    for video in tracked(labels.videos(), "videos"):
        try:
            values, times = _read(labels.dataset(video, "features")), labels.intervals(video)
        except ValueError as error:
            found.problem(video, f"its labels cannot be used: {labels} {error}", "Copy the .csd file again")
            continue
        if len(times) == 0:
            found.leave_out(video, "has no labelled interval")
            continue
        _video(found, sequences, by_name, video, values.reshape(len(times), -1), times)
    videos = labels.videos()
    for name in sorted(set(by_name) - {video.split("[", maxsplit=1)[0] for video in videos} - set(videos)):
        found.leave_out(name, f"in {found.options.split_from} and without labels")


def _video(
    found: Found, sequences: dict[str, Sequence], by_name: dict[str, Any], video: str, values: Any, times: Any
) -> None:
    """Adds the clips of one video."""
    middles: dict[str, np.ndarray] = {}
    for role, sequence in sequences.items():
        if video not in _names(sequence):
            continue
        try:
            middles[role] = sequence.intervals(video).mean(axis=1)
        except ValueError as error:
            found.problem(video, f"{sequence} {error}", "Copy the .csd file again")
            return
    for i, (begin, end) in enumerate(times):
        clip = f"{video}[{i}]"
        split = by_name.get(clip) or by_name.get(video) or by_name.get(video.split("[", maxsplit=1)[0])
        if split is None:
            found.leave_out(clip, f"not in {found.options.split_from}")
            continue
        if not values.shape[1]:
            found.problem(clip, "has no label", "Leave the video out of the split file")
            continue
        inside = {role: np.flatnonzero((middle >= begin) & (middle < end)) for role, middle in middles.items()}
        try:
            words = _words(sequences["transcript"], video, inside["transcript"]) if "transcript" in inside else None
            cuts = {role: _cut(sequences[role], video, rows) for role, rows in inside.items() if role != "transcript"}
        except ValueError as error:
            found.problem(clip, str(error), "Copy the .csd file again")
            continue
        found.add(
            clip,
            values[i, 0],
            split,
            str(found.options.split_from),
            audio=cuts.get("audio"),
            text=words,
            text_features=cuts.get("text"),
            vision=cuts.get("vision"),
            extra={"video": video, "interval": [float(begin), float(end)], "annotations": values[i]},
        )


def _cut(sequence: Sequence, video: str, rows: np.ndarray) -> Cut | None:
    if len(rows) == 0:
        return None
    begin, end = int(rows[0]), int(rows[-1]) + 1
    picked = None if end - begin == len(rows) else tuple((rows - begin).tolist())
    data = sequence.dataset(video, "features")
    return Cut(sequence, video, begin, end, picked, data.shape[1] if data.ndim == 2 else 0)


def _words(sequence: Sequence, video: str, rows: np.ndarray) -> str:
    data = sequence.dataset(video, "features")
    if data.dtype.kind not in "SO" or data.size != len(data):
        raise ValueError(f"{sequence} has type {data.dtype} and shape {list(data.shape)}, which is not a word a step")
    if len(rows) == 0:
        return ""
    words = _read(data, slice(int(rows[0]), int(rows[-1]) + 1)).reshape(-1)[rows - rows[0]].tolist()
    told = [word.decode(errors="replace") if isinstance(word, bytes) else str(word) for word in words]
    return " ".join(word for word in told if word != SILENCE)


def _sequences(found: Found) -> dict[str, Sequence]:
    """The sequence of each role: as the options name it (sequence or file), or the only one whose name tells."""
    source = found.source
    files = (
        sorted(path for path in source.glob("*") if path.suffix in SUFFIXES and path.is_file())
        if source.is_dir()
        else []
    )
    if not files:
        raise UserError(str(source), "holds no .csd files", "Name the folder of the computational sequences")
    there: list[Sequence] = []
    errors: list[UserError] = []
    for path in files:
        try:
            there += [Sequence(path, name) for name in _open(path)]
        except ValueError as error:
            errors.append(UserError(str(path), str(error), "Copy it again, or move it away"))
    chosen = {}
    for role, names in ROLES.items():
        named = getattr(found.options, role)
        if named is not None:
            fitting = [one for one in there if named in (one.name, one.path.name, one.path.stem)]
        else:
            fitting = [one for one in there if one.name.lower().startswith(names)]
        if len(fitting) == 1:
            chosen[role] = fitting[0]
        elif fitting or named is not None or role == "label":
            problem = f"{len(fitting)} sequences in {source} could be it" if named is None else f"{named!r} is not one"
            told = ", ".join(one.name for one in fitting or there) or "none"
            errors.append(UserError(f"--{role}", problem, f"Name one of: {told}"))
    if errors:
        raise UserErrors(errors)
    return chosen


@functools.lru_cache(maxsize=16)
def _open(path: Path) -> Any:
    h5py = need("h5py", "reading .csd files")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"cannot be read, damaged or truncated ({str(error).splitlines()[0]:.120})") from None


@functools.lru_cache(maxsize=16)
def _names(sequence: Sequence) -> frozenset[str]:
    return frozenset(sequence.videos())


def _hard(group: Any, name: str) -> Any:
    """A member that lies in the file itself: links to other files would read whatever they name."""
    h5py = need("h5py", "reading .csd files")
    if not isinstance(group, h5py.Group) or name not in group:
        raise ValueError(f"has no {name}")
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"has {name} as a link")
    try:
        return group[name]
    except (OSError, KeyError, RuntimeError) as error:
        raise ValueError(f"has a damaged {name} ({error})") from None


def _read(data: Any, rows: Any = slice(None)) -> np.ndarray:
    try:
        return np.asarray(data[rows] if data.ndim else data[()])
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"is damaged ({str(error).splitlines()[0]:.120})") from None
