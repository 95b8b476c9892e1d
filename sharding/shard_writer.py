"""Writes the on-disk corpus of `shards`: equal samples give equal bytes, and OUT appears only when it is complete."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import tarfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile

from sharding.dataset_file import finish_dataset, write_synced
from sharding.errors import UserError
from sharding.shards import (
    FORMAT,
    SAMPLE_RATE,
    Columns,
    DatasetInfo,
    Dims,
    SetAside,
    ShardIndex,
    Split,
)

_END_OF_ARCHIVE = bytes(2 * tarfile.BLOCKSIZE)


@dataclass(frozen=True)
class PackedSample:
    """A sample as it goes into a tar: its byte range and its row of the index."""

    data: bytes
    row: dict[str, Any]  # Columns without offset


def pack_sample(
    key: str,
    label: float,
    split: str,
    *,
    audio: np.ndarray | None = None,
    text: str | None = None,
    text_features: np.ndarray | None = None,
    simulated: np.ndarray | None = None,
    vision: np.ndarray | None = None,
    extra: dict[str, Any] | None = None,
    dtype: type[np.floating] = np.float32,
) -> PackedSample:
    """Encode one sample. Equal input gives equal bytes.

    Args:
        key: sample name without "." and "/" (WebDataset groups files by what precedes the first dot).
        label: finite.
        split: one of SPLITS.
        audio: float [samples], a 16 kHz waveform in [-1, 1] (stored as PCM16), or float [T, D] features.
        text: transcript.
        text_features: float [T, D].
        simulated: float [T, D], features of the text that a model imagines.
        vision: float [T, D].
        extra: JSON values kept in KEY.json.
        dtype: one of `shards.STORED`, of audio and text features; vision is stored as float32.
    """
    parts: dict[str, bytes] = {}
    waveform = audio is not None and audio.ndim == 1
    if waveform:
        parts["wav"] = _encode_wav(audio)
    elif audio is not None:
        parts["audio.npy"] = _encode_npy(audio, dtype)
    if text is not None:
        parts["txt"] = text.encode()
    if text_features is not None:
        parts["text.npy"] = _encode_npy(text_features, dtype)
    if simulated is not None:
        parts["simulated.npy"] = _encode_npy(simulated, dtype)
    if vision is not None:
        parts["vision.npy"] = _encode_npy(vision, np.float32)
    record = {**(extra or {}), "key": key, "label": label, "split": split}
    parts["json"] = json.dumps(record, sort_keys=True).encode()

    data = b"".join(_tar_member(f"{key}.{extension}", parts[extension]) for extension in sorted(parts))
    row = {
        "key": key,
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "label": float(label),
        **lengths(audio, text, text_features, simulated, vision),
    }
    return PackedSample(data, row)


def lengths(
    audio: np.ndarray | None,
    text: str | None,
    text_features: np.ndarray | None,
    simulated: np.ndarray | None,
    vision: np.ndarray | None,
) -> dict[str, float | int | None]:
    """What the index says of a sample's lengths: see `Columns`."""
    waveform = audio is not None and audio.ndim == 1
    return {
        "audio_seconds": len(audio) / SAMPLE_RATE if audio is not None and waveform else None,
        "audio_frames": len(audio) if audio is not None and not waveform else None,
        "text_characters": None if text is None else len(text),
        "text_frames": None if text_features is None else len(text_features),
        "simulated_frames": None if simulated is None else len(simulated),
        "vision_frames": None if vision is None else len(vision),
    }


def _encode_wav(waveform: np.ndarray | None) -> bytes:
    assert waveform is not None
    buffer = io.BytesIO()
    # Our own rounding: reading divides by 32768, so PCM16 input is kept bit by bit.
    pcm = np.clip(np.rint(waveform * 32768.0), -32768, 32767).astype(np.int16)
    soundfile.write(buffer, pcm, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def _encode_npy(array: np.ndarray, dtype: type[np.floating]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array, dtype=dtype), allow_pickle=False)
    return buffer.getvalue()


def _tar_member(name: str, data: bytes) -> bytes:
    header = tarfile.TarInfo(name)  # mtime, uid and gid are 0, owner names empty
    header.size, header.mode = len(data), 0o444
    return header.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


@dataclass
class _OpenShard:
    """The tar of one split that is being written."""

    split: Split
    name: str
    stream: BinaryIO
    hash: Any = field(default_factory=hashlib.sha256)
    columns: Columns = field(default_factory=Columns)
    size: int = 0

    def add(self, sample: PackedSample) -> None:
        for name, value in {**sample.row, "offset": self.size}.items():
            getattr(self.columns, name).append(value)
        self._write(sample.data)

    def end(self) -> ShardIndex:
        """Everything is on the disk; the index is not written yet."""
        self._write(_END_OF_ARCHIVE)
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()
        return ShardIndex.model_construct(
            format=FORMAT,
            split=self.split,
            tar=self.name,
            bytes=self.size,
            sha256=self.hash.hexdigest(),
            columns=self.columns,
        )

    def _write(self, data: bytes) -> None:
        self.stream.write(data)
        self.hash.update(data)
        self.size += len(data)


class DatasetWriter:
    """Takes packed samples in order; made by `write_dataset`."""

    def __init__(
        self,
        directory: Path,
        dims: Dims,
        label_range: tuple[float, float],
        samples_per_shard: int,
        classes: list[str] | None = None,
    ) -> None:
        self.set_aside: list[SetAside] = []
        self._directory, self._dims = directory, dims
        self._label_range, self._samples_per_shard, self._classes = label_range, samples_per_shard, classes
        self._open: dict[Split, _OpenShard] = {}
        self._indexes: dict[Split, list[ShardIndex]] = {}
        self._files = ExitStack()

    def add(self, split: Split, sample: PackedSample) -> None:
        """Append a sample to the split's current tar.

        Raises:
            OSError: the disk refuses it.
        """
        shard = self._open.get(split) or self._start_shard(split)
        shard.add(sample)
        if len(shard.columns.key) == self._samples_per_shard:
            self._end_shard(self._open.pop(split))

    def attach(self, name: str, text: str) -> None:
        """Put a file beside the tars, which readers of the shards do not need.

        Raises:
            OSError: the disk refuses it.
        """
        write_synced(self._directory / name, text)

    def finish(self) -> DatasetInfo:
        """Close the tars and write dataset.json."""
        for shard in self._open.values():
            self._end_shard(shard)
        self._open.clear()
        return finish_dataset(
            self._directory,
            self._indexes,
            dims=self._dims,
            label_range=self._label_range,
            set_aside=self.set_aside,
            classes=self._classes,
        )

    def close(self) -> None:
        """Close the open tars without finishing them."""
        self._files.close()

    def _start_shard(self, split: Split) -> _OpenShard:
        name = tar_name(split, len(self._indexes.get(split, [])))
        stream = self._files.enter_context((self._directory / name).open("wb"))
        self._open[split] = _OpenShard(split, name, stream)
        return self._open[split]

    def _end_shard(self, shard: _OpenShard) -> None:
        index = shard.end()
        write_synced(self._directory / f"{shard.name}.index.json", index.model_dump_json())
        self._indexes.setdefault(shard.split, []).append(index)


def tar_name(split: Split, number: int) -> str:
    """Of a split's tars, counted from 0."""
    return f"{split}-{number:06d}.tar"


def write_shard(directory: Path, split: Split, number: int, samples: Iterable[PackedSample]) -> None:
    """One tar and its index, each there as a whole or not at all.

    Raises:
        OSError: the disk refuses it.
    """
    name = tar_name(split, number)
    temporary = directory / f".{name}.{uuid.uuid4().hex[:8]}"
    try:
        with temporary.open("wb") as stream:
            shard = _OpenShard(split, name, stream)
            for sample in samples:
                shard.add(sample)
            index = shard.end()
        temporary.replace(directory / name)
        write_synced(temporary, index.model_dump_json())
        temporary.replace(directory / f"{name}.index.json")
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def write_dataset(
    out: Path,
    *,
    dims: Dims,
    label_range: tuple[float, float],
    samples_per_shard: int,
    classes: list[str] | None = None,
) -> Iterator[DatasetWriter]:
    """Write a dataset into a hidden directory beside `out`, renamed to `out` when the block ends well, else removed.

    Raises:
        UserError: `out` exists, cannot be written, the disk is full, or Ctrl-C was pressed.
    """
    refuse_existing(out)
    partial = out.parent / f".{out.name}.partial-{uuid.uuid4().hex[:8]}"
    made = [parent for parent in (out.parent, *out.parent.parents) if not parent.exists()]
    writer = DatasetWriter(partial, dims, label_range, samples_per_shard, classes)
    try:
        partial.mkdir(parents=True)
        yield writer
        writer.finish()
        partial.rename(out)
        made.clear()
    except KeyboardInterrupt:
        raise UserError(str(out), "interrupted", "Nothing was kept; run the command again") from None
    except OSError as error:
        raise write_error(out, error) from error
    finally:
        # A full disk refuses the buffered rest once more on close; the file goes away anyway.
        with suppress(OSError):
            writer.close()
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            if parent.exists() and not any(parent.iterdir()):
                parent.rmdir()


def refuse_existing(out: Path) -> None:
    """Refuses to write over anything.

    Raises:
        UserError: `out` exists.
    """
    if out.exists() or out.is_symlink():
        raise UserError(str(out), "exists", "Name a new directory, or remove this one first")


def write_error(out: Path, error: OSError) -> UserError:
    """What to tell of a place that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(
            str(out), f"disk full ({error.strerror})", "Nothing was kept; free space or choose another disk"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(str(out), f"no write permission ({error.strerror})", "Choose a directory you may write to")
    return UserError(str(out), f"cannot be written ({error.strerror or error})", "Choose another directory")
