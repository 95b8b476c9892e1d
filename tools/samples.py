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
from tools.imports.media import sound_of
from tools.manifest import FILES, FILM_SUFFIXES, Row
from tools.sources import Features, Film, Media

SHORTEST = 400  # samples at 16 kHz: one window of the speech encoder's convolutions (25 ms)
RATES = (1000, 768_000)  # Hz that recorders use, with room; others are a mistake or fill the memory when resampled
MOST_VALUES = 1 << 29  # decoded at once, 2 GiB: an hour of stereo at 48 kHz has 2^28.4
MOST_CHUNKS = 1000  # before the audio of a wav; recorders write a handful
VOTERS = 1000


@dataclass(frozen=True)
class Prepared:
    """A packed sample, and what was done to it: "resampled", "mixed to mono", "clipped", "filled"."""

    sample: PackedSample
    done: tuple[str, ...]


def find_dims(rows: list[Row]) -> Dims:
    """The width most files have, per kind (ties: the first); other widths are then errors of their samples.

    Reads the headers of at most VOTERS files of each kind, spread over the manifest. Unreadable files are passed over
    here and reported by `prepare`.
    """
    most: dict[str, int | str | None] = {}
    for name in FILES:
        sources = [source for row in rows if (source := getattr(row, name)) is not None]
        widths = Counter(map(_width, sources[:: -(-len(sources) // VOTERS) or 1]))
        widths.pop(None, None)
        most[name] = widths.most_common(1)[0][0] if widths else None
    return Dims.model_validate({**most, "text": most.pop("text_features")})


def _width(source: Path | Media | Features) -> int | str | None:
    if isinstance(source, Features):
        return source.width
    if isinstance(source, Media) or source.suffix.lower() != ".npy":
        return "waveform"
    try:
        with source.open("rb") as file:
            shape = read_shape(file, source.stat().st_size)
    except (OSError, ValueError):
        return None
    return shape[1] if len(shape) == 2 and shape[1] > 0 else None


def prepare(row: Row, dims: Dims, fill: bool = False) -> Prepared | UserError:
    """Read, check and pack one row. An error is returned, not raised: it has to cross processes with its fields.

    Args:
        row: of the manifest.
        dims: widths the corpus has.
        fill: write 0 where features are NaN or infinite, which is an error otherwise.

    Returns:
        The packed sample, or the UserError that names the sample and the file.
    """
    done: list[str] = []
    try:
        audio = None
        if isinstance(row.audio, Features) or (isinstance(row.audio, Path) and row.audio.suffix.lower() == ".npy"):
            audio = read_features(row.audio, dims.audio, fill, done)
        elif row.audio is not None:
            if dims.audio != "waveform":
                raise _bad(row.audio, f"is a waveform, most audio of this corpus is features of width {dims.audio}")
            audio = read_waveform(row.audio, done)
        text, simulated, vision = (
            None if source is None else read_features(source, width, fill, done)
            for source, width in (
                (row.text_features, dims.text),
                (row.simulated, dims.simulated),
                (row.vision, dims.vision),
            )
        )
        packed = pack_sample(
            row.key,
            row.label,
            row.split,
            audio=audio,
            text=row.text,
            text_features=text,
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


def read_waveform(source: Path | Media, done: list[str]) -> np.ndarray:
    """Decode a sound, or the sound track of a film, to 16 kHz mono.

    Args:
        source: a file that libsndfile reads, or a film.
        done: gets "resampled", "mixed to mono", "clipped" appended where that was needed.

    Returns:
        float32 [samples] in [-1, 1].

    Raises:
        UserError: undecodable, truncated, empty, shorter than 25 ms, longer than LONGEST_SECONDS, or with NaN.
    """
    if isinstance(source, Path) and source.suffix.lower() in FILM_SUFFIXES:
        source = Film(source)
    if isinstance(source, Path):
        audio, rate = _decode_file(source)
    else:
        try:
            with source.open() as file:
                audio, rate = sound_of(file)
        except (ValueError, OSError) as error:
            raise _bad(source, str(getattr(error, "strerror", None) or error)) from error
    if len(audio) == 0:
        raise _bad(source, "is empty")
    if not np.isfinite(audio).all():
        raise _bad(source, "holds NaN or infinite samples")
    if audio.shape[1] > 1:
        done.append("mixed to mono")
    mono = audio.mean(axis=1)
    if rate != SAMPLE_RATE:
        done.append("resampled")
        mono = soxr.resample(mono, rate, SAMPLE_RATE)
    if len(mono) < SHORTEST:
        raise _bad(source, f"is too short ({len(mono) / SAMPLE_RATE * 1000:.1f} ms; at least 25 ms)")
    if np.abs(mono).max() > 1.0:
        done.append("clipped")
    return np.clip(mono, -1.0, 1.0)


def _decode_file(path: Path) -> tuple[np.ndarray, int]:
    """A sound file's samples [frames, channels] and rate."""
    try:
        _refuse_cut_wav(path)
        with soundfile.SoundFile(path) as stream:
            rate, expected = stream.samplerate, stream.frames
            _refuse_length(path, stream)
            audio = stream.read(dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise _bad(path, f"cannot be decoded, damaged or truncated ({_reason(error)})") from error
    if len(audio) != expected:
        raise _bad(path, f"is truncated ({len(audio)} of {expected} frames decode)")
    return audio, rate


def read_features(
    source: Path | Features, width: int | str | None, fill: bool = False, done: list[str] | None = None
) -> np.ndarray:
    """Features of a .npy file or of another source.

    Args:
        source: where they are.
        width: D that the corpus has.
        fill: write 0 where they are NaN or infinite.
        done: gets "filled" appended where that was needed.

    Returns:
        float32 [T, D], T >= 1.

    Raises:
        UserError: unreadable, pickled, wrong rank or width, empty, not numeric, NaN or infinite in float32.
    """
    try:
        if isinstance(source, Features):
            array = source.read()
        else:
            with source.open("rb") as file:
                array = read_npy(file, source.stat().st_size)
    except OSError as error:
        raise _bad(source, f"cannot be read ({_reason(error)})") from error
    except ValueError as error:
        raise _bad(source, str(error)) from None
    if array.ndim != 2:
        raise _bad(source, f"has rank {array.ndim} (shape {list(array.shape)}), expected [time, width]")
    if width == "waveform":
        raise _bad(source, "is features, most audio of this corpus is waveforms")
    if array.shape[1] != width:
        raise _bad(source, f"has width {array.shape[1]}, most files of this corpus have {width}")
    if len(array) == 0:
        raise _bad(source, "is empty")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    finite = np.isfinite(array)
    if not finite.all() and not fill:
        problem = f"holds NaN or infinite values ({np.sum(~finite)} of {array.size})"
        raise _bad(
            source, problem, "Repair it, or write 0 there with --fill-non-finite, or use --on-bad-sample set_aside"
        )
    if not finite.all():
        array[~finite] = 0
        if done is not None:
            done.append("filled")
    return array


REPAIR = "Repair the file, leave the cell empty, or use --on-bad-sample set_aside"


def _bad(source: Path | Media | Features, problem: str, remedy: str = REPAIR) -> UserError:
    return UserError(str(source), problem, remedy)


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
