"""From a manifest row to a packed sample: audio to 16 kHz mono, arrays checked, everything wrong named."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from sharding.errors import UserError
from sharding.npy import read_npy, read_shape
from sharding.shard_writer import PackedSample, pack_sample
from sharding.shards import LONGEST_SECONDS, SAMPLE_RATE, Dims
from tools.manifest import FILES, Row

SHORTEST = 400  # samples at 16 kHz: one window of the speech encoder's convolutions (25 ms)
RATES = (1000, 768_000)  # Hz that recorders use, with room; others are a mistake or fill the memory when resampled
MOST_VALUES = 1 << 29  # decoded at once, 2 GiB: an hour of stereo at 48 kHz has 2^28.4
MOST_CHUNKS = 1000  # before the audio of a wav; recorders write a handful
VOTERS = 1000


@dataclass(frozen=True)
class Prepared:
    """A packed sample, and what was done to its audio ("resampled", "mixed to mono", "clipped")."""

    sample: PackedSample
    done: tuple[str, ...]


def find_dims(rows: list[Row]) -> Dims:
    """The width most files have, per kind (ties: the first); other widths are then errors of their samples.

    Reads the headers of at most VOTERS files of each kind, spread over the manifest. Unreadable files are passed over
    here and reported by `prepare`.
    """
    most: dict[str, int | str | None] = {}
    for name in FILES:
        paths: list[Path] = [path for row in rows if (path := getattr(row, name)) is not None]
        widths = Counter(map(_width, paths[:: -(-len(paths) // VOTERS) or 1]))
        widths.pop(None, None)
        most[name] = widths.most_common(1)[0][0] if widths else None
    return Dims.model_validate({**most, "text": most.pop("text_features")})


def _width(path: Path) -> int | str | None:
    if path.suffix.lower() != ".npy":
        return "waveform"
    try:
        with path.open("rb") as file:
            shape = read_shape(file, path.stat().st_size)
    except (OSError, ValueError):
        return None
    return shape[1] if len(shape) == 2 and shape[1] > 0 else None


def prepare(row: Row, dims: Dims) -> Prepared | UserError:
    """Read, check and pack one row. An error is returned, not raised: it has to cross processes with its fields.

    Args:
        row: of the manifest.
        dims: widths the corpus has.

    Returns:
        The packed sample, or the UserError that names the sample and the file.
    """
    done: list[str] = []
    try:
        if row.audio is None:
            audio = None
        elif row.audio.suffix.lower() == ".npy":
            audio = read_features(row.audio, dims.audio)
        elif dims.audio != "waveform":
            raise _bad(row.audio, f"is a waveform, most audio of this corpus is features of width {dims.audio}")
        else:
            audio = read_waveform(row.audio, done)
        text_features = None if row.text_features is None else read_features(row.text_features, dims.text)
        simulated = None if row.simulated is None else read_features(row.simulated, dims.simulated)
        vision = None if row.vision is None else read_features(row.vision, dims.vision)
        packed = pack_sample(
            row.key,
            row.label,
            row.split,
            audio=audio,
            text=row.text,
            text_features=text_features,
            simulated=simulated,
            vision=vision,
            extra=row.extra,
        )
    except UserError as error:
        return UserError(f"sample {row.key}, {error.where}", error.problem, error.remedy)
    except RecursionError:  # of json, in the columns that are only kept
        return UserError(f"sample {row.key}", "has a field that is nested too deeply", "Write it flat")
    except MemoryError:
        return UserError(f"sample {row.key}", "does not fit in memory", "Cut the clip, or use fewer --workers")
    return Prepared(packed, tuple(done))


def read_waveform(path: Path, done: list[str]) -> np.ndarray:
    """Decode an audio file to 16 kHz mono.

    Args:
        path: anything libsndfile reads.
        done: gets "resampled", "mixed to mono", "clipped" appended where that was needed.

    Returns:
        float32 [samples] in [-1, 1].

    Raises:
        UserError: undecodable, truncated, empty, shorter than 25 ms, longer than LONGEST_SECONDS, or with NaN.
    """
    try:
        _refuse_cut_wav(path)
        with soundfile.SoundFile(path) as stream:
            rate, expected = stream.samplerate, stream.frames
            _refuse_length(path, stream)
            audio = stream.read(dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise _bad(path, f"cannot be decoded, damaged or truncated ({_reason(error)})") from error
    if expected == 0:
        raise _bad(path, "is empty")
    if len(audio) != expected:
        raise _bad(path, f"is truncated ({len(audio)} of {expected} frames decode)")
    if not np.isfinite(audio).all():
        raise _bad(path, "holds NaN or infinite samples")
    if audio.shape[1] > 1:
        done.append("mixed to mono")
    mono = audio.mean(axis=1)
    if rate != SAMPLE_RATE:
        done.append("resampled")
        mono = soxr.resample(mono, rate, SAMPLE_RATE)
    if len(mono) < SHORTEST:
        raise _bad(path, f"is too short ({len(mono) / SAMPLE_RATE * 1000:.1f} ms; at least 25 ms)")
    if np.abs(mono).max() > 1.0:
        done.append("clipped")
    return np.clip(mono, -1.0, 1.0)


def read_features(path: Path, width: int | str | None) -> np.ndarray:
    """A feature file.

    Args:
        path: .npy.
        width: D that the corpus has.

    Returns:
        float32 [T, D], T >= 1.

    Raises:
        UserError: unreadable, pickled, wrong rank or width, empty, not numeric, NaN or infinite in float32.
    """
    try:
        with path.open("rb") as file:
            array = read_npy(file, path.stat().st_size)
    except OSError as error:
        raise _bad(path, f"cannot be read ({_reason(error)})") from error
    except ValueError as error:
        raise _bad(path, str(error)) from None
    if array.ndim != 2:
        raise _bad(path, f"has rank {array.ndim} (shape {list(array.shape)}), expected [time, width]")
    if width == "waveform":
        raise _bad(path, "is features, most audio of this corpus is waveforms")
    if array.shape[1] != width:
        raise _bad(path, f"has width {array.shape[1]}, most files of this corpus have {width}")
    if len(array) == 0:
        raise _bad(path, "is empty")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise _bad(path, "holds NaN or infinite values")
    return array


def _bad(path: Path, problem: str) -> UserError:
    return UserError(str(path), problem, "Repair the file, leave the cell empty, or use --on-bad-sample set_aside")


def _reason(error: Exception) -> str:
    # libsndfile repeats the path in front of the reason, and has no text for some errors.
    text = getattr(error, "error_string", "") or getattr(error, "strerror", "") or str(error)
    return str(text).removeprefix("Error : ").strip().rstrip(".") or "broken stream"


def _refuse_length(path: Path, stream: soundfile.SoundFile) -> None:
    """Before anything is decoded: a few kilobytes may declare, or really hold, hours of silence."""
    low, high = RATES
    if not low <= stream.samplerate <= high:
        raise _bad(path, f"has {stream.samplerate} Hz, not {low} to {high}")
    seconds = stream.frames / stream.samplerate
    if seconds > LONGEST_SECONDS:
        raise _bad(path, f"lasts {seconds:.0f} s by its header, or does not tell; a clip at most {LONGEST_SECONDS} s")
    if stream.frames * stream.channels > MOST_VALUES:
        raise _bad(path, f"has {stream.frames} × {stream.channels} values, at most {MOST_VALUES} are decoded")


def _refuse_cut_wav(path: Path) -> None:
    """libsndfile shortens a wav whose data chunk is cut without a word: compare the chunk with the file.

    Streamed wavs state the size 0 or 0xFFFFFFFF-ish for "unknown"; those are taken as they are.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        if stream.read(4) != b"RIFF":
            return
        stream.seek(12)
        for _ in range(MOST_CHUNKS):
            header = stream.read(8)
            if len(header) < 8:
                return
            length = int.from_bytes(header[4:], "little")
            rest = size - stream.tell()
            if header[:4] == b"data":
                if rest < length < 0x7FFFF000:
                    raise _bad(path, f"is truncated ({rest} of {length} bytes of audio)")
                return
            stream.seek(length + length % 2, os.SEEK_CUR)
    raise _bad(path, f"has no audio among its first {MOST_CHUNKS} chunks")
