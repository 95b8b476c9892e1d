"""The on-disk corpus: plain WebDataset tars, an index beside each, one dataset.json.

    dataset.json                    counts, dims, label statistics, content hash, tars of each split
    train-000000.tar                samples: KEY.wav | KEY.audio.npy, KEY.txt, KEY.text.npy, KEY.simulated.npy,
                                    KEY.vision.npy, KEY.json
    train-000000.tar.index.json     of each sample: byte range, checksum, label, lengths
    train.columns.safetensors       optional: the rows of all indexes of a split in key order, for opening (see `table`)

`shard_writer` writes it; here are its models and the reading of samples by byte range. `dist-train shards make` puts
the samples of a split into its tars in key order; a reader may not rely on that.

Sample bytes do not depend on the shard they lie in, so `content_hash` (sha256 over the sorted lines
"split TAB key TAB sample sha256 NEWLINE") names the content and not its layout: other shard sizes, manifest orders and
worker counts give the same hash.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import soundfile
from pydantic import BaseModel, Field, FiniteFloat, NonNegativeInt, PositiveInt, ValidationError, field_validator

from sharding.errors import UserError, UserErrors
from sharding.files import MOST_JSON, read_bounded
from sharding.npy import read_npy
from sharding.tar import members

FORMAT = "dist-train-shards/1"
SPLITS = ("train", "valid", "test")
SAMPLE_RATE: Literal[16000] = 16000
# A clip is an utterance, hours are a mistake or a bomb: a few kilobytes of FLAC decode to days of silence.
LONGEST_SECONDS = 3600
LARGEST_LABEL = 1e6  # a square of it, summed over a batch, is far from the end of fp32
LONGEST_KEY = 1000  # characters
MOST_CLASSES, LONGEST_CLASS = 200, 40  # how many, and characters of a name
SOURCE = "source"  # of `DatasetInfo.features`: content hash of the shards that were read
REMAKE = "Copy the shards again, or make them anew with `dist-train shards make`"

Split = Literal["train", "valid", "test"]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
TarName = Annotated[str, Field(pattern=r"^(train|valid|test)-\d{6,}\.tar$")]
# What a tar and a file system can name, and a terminal print.
Key = Annotated[str, Field(pattern=r"^[^./\p{C}\p{Zl}\p{Zp}]+$", max_length=LONGEST_KEY)]
Label = Annotated[float, Field(ge=-LARGEST_LABEL, le=LARGEST_LABEL)]
Seconds = Annotated[float, Field(ge=0, le=LONGEST_SECONDS)]
Length = Annotated[int, Field(ge=0, lt=2**31)]
Width = Annotated[int, Field(ge=1, le=2**20)]
Scalar = str | int | float | bool | None
Features = dict[str, Scalar | dict[str, Scalar]]
Model = TypeVar("Model", bound=BaseModel)


class Columns(BaseModel):
    """One entry per sample, in tar order; None where the modality is absent."""

    key: list[Key] = []
    offset: list[NonNegativeInt] = []  # bytes from the start of the tar
    size: list[PositiveInt] = []  # bytes, headers included
    sha256: list[Sha256] = []  # of those bytes
    label: list[Label] = []
    audio_seconds: list[Seconds | None] = []  # waveforms
    audio_frames: list[Length | None] = []  # features
    text_characters: list[Length | None] = []  # transcript
    text_frames: list[Length | None] = []  # features
    simulated_frames: list[Length | None] = []  # features; shards made before they existed lack the column
    vision_frames: list[Length | None] = []


class ShardIndex(BaseModel):
    """TAR.index.json: names its tar and where each sample lies in it."""

    format: str = FORMAT
    split: Split
    tar: TarName
    bytes: int
    sha256: Sha256
    columns: Columns


class ShardEntry(BaseModel):
    """A tar as dataset.json lists it."""

    file: TarName
    samples: PositiveInt
    bytes: PositiveInt
    sha256: Sha256


class LabelStatistics(BaseModel):
    """Of one split. `counts[i]` labels lie in [edges[i], edges[i+1]), the last bin closed."""

    min: Label
    max: Label
    mean: Label
    median: Label
    edges: list[Label]
    counts: list[NonNegativeInt]


class SplitInfo(BaseModel):
    """One split; `missing` counts the samples without audio, text (neither transcript nor features), vision."""

    shards: list[ShardEntry]
    samples: PositiveInt
    seconds: Annotated[FiniteFloat, Field(ge=0)]  # of waveforms
    labels: LabelStatistics
    missing: dict[Literal["audio", "text", "vision"], NonNegativeInt]


class Dims(BaseModel):
    """Widths that all samples share; None: no sample has that kind."""

    audio: Width | Literal["waveform"] | None = None
    text: Width | None = None
    simulated: Width | None = None
    vision: Width | None = None


class SetAside(BaseModel):
    """A sample of the manifest that is not in the shards, and why."""

    key: str
    reason: str


class DatasetInfo(BaseModel):
    """dataset.json."""

    format: str = FORMAT
    splits: dict[Split, SplitInfo]
    dims: Dims
    sample_rate: Literal[16000] = SAMPLE_RATE
    label_range: tuple[Label, Label]
    set_aside: list[SetAside]
    content_hash: Sha256
    features: Features | None = None
    """Of extracted features: what decides them, by section. Whoever trains on them may ask for it."""
    classes: list[str] | None = None
    """Where labels are classes: their names. A label is then the place of its class in this list, from 0."""

    @field_validator("classes")
    @classmethod
    def named(cls, classes: list[str] | None) -> list[str] | None:
        """Names that can be told apart, and shown."""
        for problem, _ in class_problems(classes or []) if classes is not None else ():
            raise ValueError(problem)
        return classes


def class_problems(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What is wrong with a list of class names, and what to do."""
    if not 2 <= len(names) <= MOST_CLASSES:
        yield f"names {len(names)} classes", f"Write 2 to {MOST_CLASSES}"
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        yield f"names the class {twice[0]!r} twice", "Write each name once"
    for name in names:
        plain = all(unicodedata.category(c)[0] != "C" and unicodedata.category(c) not in ("Zl", "Zp") for c in name)
        if not plain or not 0 < len(name) <= LONGEST_CLASS or name != name.strip() or set(name) & set(",=:$[]"):
            problem = f"names a class {name[:LONGEST_CLASS]!r}"
            yield (
                problem,
                f"Write 1 to {LONGEST_CLASS} printable characters without , = : $ [ ] and outer white space",
            )
        elif _is_number(name):
            yield f"names a class {name!r}, which is a number", "Give it a name that is none"


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True


def content_hash(samples: Iterable[tuple[str, str, str]]) -> str:
    """sha256 of (split, key, sample sha256) triples, in any order."""
    return hashlib.sha256("".join("\t".join(line) + "\n" for line in sorted(samples)).encode()).hexdigest()


@dataclass(frozen=True)
class Dataset:
    """A checked shard directory: dataset.json and the indexes that were asked for."""

    root: Path
    info: DatasetInfo
    indexes: dict[str, list[ShardIndex]]


def load_dataset(root: Path, split: str | None = None) -> Dataset:
    """Read dataset.json and the indexes of one split (or all), and check them against the tars' names and sizes.

    Raises:
        UserError: no shard directory, another format version, unknown split, no shards.
        UserErrors: every missing, truncated or mismatched tar and index.
    """
    info = load_info(root)
    if split is not None and split not in info.splits:
        remedy = (
            f"Use {' or '.join(info.splits)}, or put clips of that split into the manifest and make the shards anew"
        )
        raise UserError(str(root), f"has no split {split!r}", remedy)
    indexes: dict[str, list[ShardIndex]] = {}
    errors: list[UserError] = []
    for name, part in info.splits.items():
        if split not in (None, name):
            continue
        indexes[name] = []
        for entry in part.shards:
            try:
                indexes[name].append(load_index(root, name, entry))
            except UserError as error:
                errors.append(error)
        keys = [key for index in indexes[name] for key in index.columns.key]
        if len(set(keys)) != len(keys):
            errors.append(UserError(str(root), f"split {name} holds a key twice", REMAKE))
    if errors:
        raise errors[0] if len(errors) == 1 else UserErrors(errors)
    return Dataset(root, info, indexes)


def load_info(root: Path) -> DatasetInfo:
    """dataset.json of a shard directory.

    Raises:
        UserError: see `load_dataset`.
    """
    path = root / "dataset.json"
    if not path.is_file():
        remedy = "Name a directory made by `dist-train shards make`"
        raise UserError(str(root), "is not a shard directory (no dataset.json)", remedy)
    info = _load_json(path, DatasetInfo)
    if not any(part.shards for part in info.splits.values()):
        raise UserError(str(root), "has no shards", REMAKE)
    for name, part in info.splits.items():
        held = sum(entry.samples for entry in part.shards)
        if part.samples != held:
            raise UserError(
                str(path), f"is damaged (splits.{name}.samples is {part.samples}, its tars hold {held})", REMAKE
            )
    return info


def load_index(root: Path, split: str, entry: ShardEntry) -> ShardIndex:
    """The index of one tar, checked against dataset.json and the tar's size.

    Raises:
        UserError: tar or index is missing, truncated or belongs to another.
    """
    tar = root / entry.file
    path = root / f"{entry.file}.index.json"
    if not tar.is_file():
        raise UserError(str(tar), "is missing", REMAKE)
    if not path.is_file():
        raise UserError(str(path), "is missing", REMAKE)
    index = _load_json(path, ShardIndex)
    columns = index.columns
    columns.simulated_frames = columns.simulated_frames or [None] * len(columns.key)
    same = (index.tar, index.split, index.bytes, index.sha256, len(columns.key)) == (
        (entry.file, split, entry.bytes, entry.sha256, entry.samples)
    )
    if not same:
        raise UserError(str(path), f"is the index of another tar ({index.tar}, {index.bytes} bytes)", REMAKE)
    lengths = {len(getattr(columns, name)) for name in Columns.model_fields}
    ends = list(itertools.accumulate(columns.size))  # of Python's integers, which do not overflow
    if len(lengths) != 1 or columns.offset != [0, *ends[:-1]] or ends[-1] > index.bytes:
        raise UserError(str(path), "is damaged (columns do not fit together)", REMAKE)
    size = tar.stat().st_size
    if size != index.bytes:
        kind = "is truncated" if size < index.bytes else "is not the tar of its index"
        raise UserError(str(tar), f"{kind} ({size} bytes, its index says {index.bytes})", REMAKE)
    return index


def _load_json(path: Path, model: type[Model]) -> Model:
    try:
        raw = json.loads(read_bounded(path, MOST_JSON, REMAKE).decode())
        version = raw.get("format") if isinstance(raw, dict) else None
        if version != FORMAT:
            raise UserError(str(path), f"has format {version!r}, this version reads {FORMAT!r}", REMAKE)
        return model.model_validate(raw)
    except OSError as error:
        raise UserError(str(path), f"cannot be read ({error.strerror})", "Check the permissions") from error
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"is damaged ({'.'.join(map(str, first['loc']))}: {first['msg']})"
        raise UserError(str(path), problem, REMAKE) from error
    except (ValueError, RecursionError) as error:
        raise UserError(str(path), f"is damaged ({error})", REMAKE) from error


def read_sample(fd: int, where: str, dims: Dims, *, key: str, offset: int, size: int, sha256: str) -> dict[str, Any]:
    """Read, verify and decode one sample's byte range.

    Args:
        fd: open descriptor of the tar (its position is not used: safe to share).
        where: the tar's path, for messages.
        dims: widths of the dataset.
        key, offset, size, sha256: the sample's row of the index.

    Returns:
        {"audio", "text", "text_features", "simulated", "vision"} as in `pack_sample`, arrays float32, None where
        absent.

    Raises:
        UserError: the range is unreadable, has another checksum, does not decode, or has another width than
            dims; names tar and key.
    """
    try:
        data = os.pread(fd, size, offset)
        if len(data) != size or hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError("bytes differ from the checksum in the index")
        sample = _decode(key, data)
        widths = (dims.audio, dims.text, dims.simulated, dims.vision)
        for modality, width in zip(_ARRAYS.values(), widths, strict=True):
            array = sample[modality]
            if array is not None and width != ("waveform" if array.ndim == 1 else array.shape[1]):
                raise ValueError(f"{modality} has shape {list(array.shape)}, dataset.json says width {width}")
            if array is not None and not np.isfinite(array).all():
                raise ValueError(f"{modality} holds NaN or infinite numbers")
        return sample
    except (ValueError, OSError, soundfile.SoundFileError) as error:
        raise UserError(f"{where}, sample {key}", str(error) or type(error).__name__, REMAKE) from error


def read_record(key: str, data: bytes, where: str) -> dict[str, Any]:
    """KEY.json among the bytes of a sample.

    Args:
        where: the tar's path, for messages.

    Raises:
        UserError: it is no JSON object.
    """
    try:
        record = json.loads(dict(members(data)).get(f"{key}.json", b"{}"))
        if not isinstance(record, dict):
            raise ValueError("json is no object")
        return record
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}, sample {key}", str(error), REMAKE) from None


def _decode(key: str, data: bytes) -> dict[str, Any]:
    sample: dict[str, Any] = dict.fromkeys(("text", *_ARRAYS.values()))
    for member, part in members(data):
        name, _, extension = member.partition(".")
        if name != key:
            raise ValueError(f"holds {member}, which is not of this sample")
        if extension in ("wav", "flac"):
            with soundfile.SoundFile(io.BytesIO(part)) as sound:
                if (sound.samplerate, sound.channels) != (SAMPLE_RATE, 1):
                    raise ValueError(f"{extension} is not {SAMPLE_RATE} Hz mono")
                if sound.frames > LONGEST_SECONDS * SAMPLE_RATE:
                    seconds = sound.frames / SAMPLE_RATE
                    raise ValueError(f"{extension} lasts {seconds:.0f} s, a clip at most {LONGEST_SECONDS}")
                sample["audio"] = sound.read(dtype="float32")
        elif extension == "txt":
            sample["text"] = part.decode()
        elif extension in _ARRAYS:
            try:
                array = read_npy(io.BytesIO(part), len(part))
            except ValueError as error:
                raise ValueError(f"{extension} {error}") from None
            if array.ndim != 2 or array.dtype not in STORED:
                raise ValueError(f"{extension} is no float16 or float32 array [T, D]")
            sample[_ARRAYS[extension]] = array.astype(np.float32, copy=False)
    return sample


STORED = (np.float32, np.float16)
_ARRAYS = {
    "audio.npy": "audio",
    "text.npy": "text_features",
    "simulated.npy": "simulated",
    "vision.npy": "vision",
}
