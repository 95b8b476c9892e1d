"""Sound tracks and pictures of films, decoded by FFmpeg's libraries (PyAV)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np

from sharding.shards import LONGEST_SECONDS
from tools.imports.packages import need

# FFmpeg also reads playlists and lists of other files, by which a film could name any file or host: these do not.
FORMATS = "mov,mp4,m4a,matroska,webm,avi,wav,mp3,flac,ogg,aac"
MOST_VALUES = 1 << 29  # of sound, decoded at once: 2 GiB
MOST_PIXELS = 1 << 26  # of a frame; 8K has half of it
CUT = 0.5  # seconds, and ...
CUT_SHARE = 0.02  # ... of the track, that may be missing at its end; containers round, and encoders pad


def sound_of(file: BinaryIO) -> tuple[np.ndarray, int]:
    """The first sound track.

    Returns:
        float32 [samples, channels] and the rate in Hz.

    Raises:
        ValueError: no such track, damaged, truncated, or longer than LONGEST_SECONDS.
        UserError: PyAV is not installed.
    """
    av = need("av", "the sound track of a film")
    pieces: list[np.ndarray] = []
    count = 0
    with _opened(av, file) as container:
        if not container.streams.audio:
            raise ValueError("has no sound track")
        track = container.streams.audio[0]
        rate = track.rate
        if not rate or not track.channels:
            raise ValueError("has a sound track without rate or channels")
        resampler = av.AudioResampler(format="fltp", layout=track.layout, rate=rate)
        for frame in (*_decoded(container, track), None):
            for part in resampler.resample(frame):
                count += part.samples
                if count > LONGEST_SECONDS * rate or count * track.channels > MOST_VALUES:
                    raise ValueError(f"has a sound track of more than {LONGEST_SECONDS} s")
                pieces.append(part.to_ndarray())
        _refuse_cut(container, track, count / rate)
    return np.concatenate(pieces, axis=1).T if pieces else np.zeros((0, 1), np.float32), rate


def frames_of(file: BinaryIO, rate: float) -> Iterator[np.ndarray]:
    """Frames of the first picture track, at most `rate` per second: the first one at or after each tick.

    Yields:
        uint8 [height, width, 3], RGB.

    Raises:
        ValueError: no such track, damaged, truncated, or longer than LONGEST_SECONDS.
        UserError: PyAV is not installed.
    """
    av = need("av", "the frames of a film")
    with _opened(av, file) as container:
        if not container.streams.video:
            raise ValueError("has no pictures")
        track = container.streams.video[0]
        step = float(1 / track.average_rate) if track.average_rate else 0.0
        first, now, tick = None, 0.0, 0
        for number, frame in enumerate(_decoded(container, track)):
            now = frame.time if frame.time is not None else number * step
            first = now if first is None else first
            if frame.width * frame.height > MOST_PIXELS:
                raise ValueError(f"has frames of {frame.width} × {frame.height} pixels")
            if now - first > LONGEST_SECONDS:
                raise ValueError(f"lasts more than {LONGEST_SECONDS} s")
            if (now - first) * rate >= tick - 1e-6:
                tick = int((now - first) * rate + 1e-6) + 1
                yield frame.to_ndarray(format="rgb24")
        _refuse_cut(container, track, now - (first or 0.0) + step)


@contextmanager
def _opened(av: Any, file: BinaryIO) -> Iterator[Any]:
    """The container; what PyAV raises becomes ValueError."""
    _refuse_cut_riff(file)
    try:
        # From open bytes and with no protocol, nothing but them can be read.
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
        with av.open(file, mode="r", options=options, metadata_errors="replace") as container:
            yield container
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(f"cannot be decoded, damaged or truncated ({error.strerror or error})") from None
    except EOFError:
        raise ValueError("cannot be decoded, damaged or truncated (it ends too early)") from None


def _decoded(container: Any, track: Any) -> Iterator[Any]:
    for frame in container.decode(track):
        if frame.is_corrupt:
            raise ValueError("holds damaged frames")
        yield frame


def _refuse_cut_riff(file: BinaryIO) -> None:
    """FFmpeg takes what is there of a truncated avi or wav for the whole: compare its chunks with the file."""
    size = file.seek(0, os.SEEK_END)
    begin = 0
    while begin + 8 <= size:
        file.seek(begin)
        header = file.read(8)
        length = int.from_bytes(header[4:], "little")
        if header[:4] != b"RIFF" or length in (0, 0xFFFFFFFF):  # another kind, or streamed
            break
        begin += 8 + length + length % 2
    file.seek(0)
    if begin > size + 1:
        raise ValueError(f"is truncated ({size} of {begin} bytes)")


def _refuse_cut(container: Any, track: Any, seconds: float) -> None:
    """FFmpeg ends a truncated track without a word: compare with what the container says of it."""
    said = 0.0
    if track.duration is not None and track.time_base is not None:
        said = float(track.duration * track.time_base)
    elif track.metadata.get("DURATION"):  # Matroska, "00:00:02.500000000"
        try:
            hours, minutes, rest = track.metadata["DURATION"].split(":")
            said = 3600 * int(hours) + 60 * int(minutes) + float(rest)
        except ValueError:
            return
    elif len(container.streams) == 1 and container.duration is not None:
        said = container.duration / 1e6
    if said - seconds > CUT + CUT_SHARE * said:
        raise ValueError(f"is truncated ({seconds:.2f} of {said:.2f} s decode)")
