"""Synthesis is a pure function of its arguments, and each argument does to the sound what it says."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sharding.errors import UserError
from tools import speech

pytest.importorskip("espeakng_loader")

ROOT = Path(__file__).resolve().parents[2]
NORMAL = {"rate": 175, "pitch": 50, "pitch_range": 50, "volume": 90}
TEXT = "The ending was magnificent. We sat near the window."


def pitch_hz(waveform: np.ndarray) -> np.ndarray:
    """Pitch of each loud 100 ms by autocorrelation, Hz."""
    frames = waveform[: len(waveform) // 1600 * 1600].reshape(-1, 1600).astype(float)
    frames = frames[frames.std(1) > 0.4 * frames.std(1).max()]
    correlation = np.fft.irfft(np.abs(np.fft.rfft(frames, 4096)) ** 2)[:, 40:228]
    return 16_000 / (40 + correlation.argmax(1))


def utterances(rng: np.random.Generator) -> list[tuple[str, str, dict[str, int]]]:
    words = ["superb", "dull", "horrible", "lovely", "kitchen", "Tuesday", "window", "brother", "station", "phone"]
    return [
        (
            " ".join(rng.choice(words, size=4)) + ".",
            voice,
            {
                "rate": int(rng.integers(125, 235)),
                "pitch": int(rng.integers(15, 90)),
                "pitch_range": int(rng.integers(0, 100)),
                "volume": int(rng.integers(50, 140)),
            },
        )
        for voice in speech.VOICES
        for _ in range(3)
    ]


def test_same_bytes_in_any_order_and_process() -> None:
    seed = int(np.random.default_rng().integers(1_000_000))
    spoken = utterances(np.random.default_rng(seed))
    first = [speech.say(text, voice, **knobs) for text, voice, knobs in spoken]
    for index in np.random.default_rng().permutation(len(spoken)):
        text, voice, knobs = spoken[index]
        np.testing.assert_array_equal(speech.say(text, voice, **knobs), first[index], err_msg=f"seed {seed}")
    script = (
        "import hashlib, sys; sys.path.insert(0, 'tests/tools')\n"
        "import numpy as np; from test_speech import utterances; from tools import speech\n"
        f"for text, voice, knobs in reversed(utterances(np.random.default_rng({seed}))):\n"
        "    print(hashlib.sha256(speech.say(text, voice, **knobs).tobytes()).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.split()[::-1] == [hashlib.sha256(audio.tobytes()).hexdigest() for audio in first], seed


@pytest.mark.parametrize("voice", speech.VOICES)
def test_knobs_do_what_they_say(voice: str) -> None:
    def say(**changed: int) -> np.ndarray:
        return speech.say(TEXT, voice, **(NORMAL | changed))

    assert len(say(rate=140)) > 1.2 * len(say(rate=210))
    assert np.median(pitch_hz(say(pitch=75))) > 1.15 * np.median(pitch_hz(say(pitch=25)))
    lively, flat = (np.log(pitch_hz(say(pitch_range=value))) for value in (95, 5))
    assert np.subtract(*np.percentile(lively, [85, 15])) > 1.3 * np.subtract(*np.percentile(flat, [85, 15]))
    assert say(volume=120).astype(float).std() > 1.5 * say(volume=60).astype(float).std()


def test_audio_is_16_khz_speech() -> None:
    audio = speech.say(TEXT, speech.VOICES[0], **NORMAL)
    assert audio.dtype == np.int16
    assert audio.ndim == 1
    assert 2.0 < len(audio) / speech.SAMPLE_RATE < 5.0  # ten words at 175 a minute
    power = np.abs(np.fft.rfft(audio.astype(float))) ** 2
    assert power[len(power) // 2 :].sum() < 0.2 * power.sum()  # most of speech lies below 4 kHz
    other = speech.say(TEXT.replace("magnificent", "disgusting"), speech.VOICES[0], **NORMAL)
    assert not np.array_equal(audio[: len(other)], other[: len(audio)])


def test_unknown_voice() -> None:
    with pytest.raises(UserError, match=r"en-us\+f2"):
        speech.say("hello", "no-such-voice", **NORMAL)
    assert len(speech.say("hello", speech.VOICES[0], **NORMAL)) > 0  # and the next call is not disturbed


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match=r"pip install 'dist-train\[demo\]'"):
        speech.require()


def test_unreadable_data_is_an_error_and_not_the_end_of_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library, _ = speech._paths()
    monkeypatch.setattr(speech, "_paths", lambda: (library, str(tmp_path)))
    with pytest.raises(UserError, match="data"):
        speech.say("hello", speech.VOICES[0], **NORMAL)
