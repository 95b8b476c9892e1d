"""Speech synthesis for the embedded corpus: eSpeak NG, from the PyPI package `espeakng-loader`, through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import soxr

from sharding.errors import UserError

SAMPLE_RATE = 16_000  # Hz, of the returned audio
VOICES = ("en-us+m3", "en-us+f2", "en-us+m7", "en-us+f4", "en-gb-x-rp+m1", "en-gb-x-rp+f5")

# Constants of espeak-ng's speak_lib.h.
_SYNCHRONOUS = 2  # audio goes to the callback, inside espeak_Synth
_DO_NOT_EXIT = 0x8000  # otherwise the library ends the process when its data are missing
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
_BY_CHARACTER = 1
_UTF8 = 1
_ABSOLUTE = 0
_SEED = 1  # of the library's noise source (breath, flutter)

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def require() -> None:
    """Raise UserError when the synthesiser is not installed."""
    _paths()


def say(text: str, voice: str, *, rate: int, pitch: int, pitch_range: int, volume: int) -> np.ndarray:
    """Speak `text`. The audio is a pure function of the arguments: same bytes in every process, in any order of calls.

    Args:
        voice: an eSpeak NG voice, for instance one of `VOICES`.
        rate: words per minute, 80 to 450.
        pitch: base pitch, 0 to 100; 50 is the voice's own.
        pitch_range: liveliness of the melody, 0 (monotone) to 100; 50 is the voice's own.
        volume: 0 to 200; 100 is the library's normal.

    Returns:
        int16 array [samples], mono, 16 kHz.

    Raises:
        UserError: the synthesiser is not installed, or does not have the voice.
    """
    pieces: list[bytes] = []

    @_Callback
    def collect(samples, count, _events):
        if samples and count > 0:
            pieces.append(ctypes.string_at(samples, 2 * count))
        return 0

    with _fresh_library() as (library, native_rate):
        library.espeak_SetSynthCallback(collect)
        library.espeak_ng_SetRandSeed(ctypes.c_long(_SEED))
        if library.espeak_SetVoiceByName(voice.encode()):
            raise UserError(f"voice {voice!r}", "eSpeak NG has no such voice", f"Use one of: {', '.join(VOICES)}")
        for parameter, value in ((_RATE, rate), (_VOLUME, volume), (_PITCH, pitch), (_RANGE, pitch_range)):
            library.espeak_SetParameter(parameter, value, _ABSOLUTE)
        utf8 = text.encode()
        library.espeak_Synth(utf8, ctypes.c_size_t(len(utf8) + 1), 0, _BY_CHARACTER, 0, _UTF8, None, None)
    native = np.frombuffer(b"".join(pieces), dtype="<i2").astype(np.float32)
    audio = soxr.resample(native, native_rate, SAMPLE_RATE)
    return np.clip(np.rint(audio), -32768, 32767).astype(np.int16)


def _paths() -> tuple[str, str]:
    """Path of the shared library and of its data directory."""
    try:
        import espeakng_loader  # noqa: PLC0415 (an optional dependency)
    except ImportError:
        raise UserError(
            "speech synthesis", "the package 'espeakng-loader' is not installed", "Run: pip install 'dist-train[demo]'"
        ) from None
    return espeakng_loader.get_library_path(), espeakng_loader.get_data_path()


@contextmanager
def _fresh_library() -> Iterator[tuple[ctypes.CDLL, int]]:
    """Load eSpeak NG, yield it with its native sample rate (Hz), unload it.

    The library keeps static variables (phase of the wave generator, flutter, noise) from one utterance to the next,
    and espeak_Terminate does not reset them; only unloading does. That costs half a millisecond.
    """
    path, data = _paths()
    library = ctypes.CDLL(path)
    try:
        native_rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data.encode(), _DO_NOT_EXIT)
        if native_rate <= 0:
            raise UserError(
                "speech synthesis",
                f"eSpeak NG cannot read its data in {data}",
                "Reinstall espeakng-loader; the environment's path must leave this one below 160 characters",
            )
        try:
            yield library, native_rate
        finally:
            library.espeak_Terminate()
    finally:
        ctypes.CDLL(None).dlclose(ctypes.c_void_p(library._handle))
