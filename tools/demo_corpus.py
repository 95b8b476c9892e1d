"""The embedded corpus of the quickstart: opinion clips whose valence is shared out over words, voice and face.

Nothing is downloaded or recorded. Per clip three standard-normal latents (words, prosody, face; pairwise correlation
`LATENT_CORRELATION`) are drawn and made observable:

* words: the first latent, made uniform, is the wanted valence; opinion words near it are chosen, and
  their mean valence times `WORD_SHARE` is `part_text`;
* prosody: rate, pitch, pitch range and volume rise with the second latent, under noise and the voice's own habits;
* face: the time-mean of a [T, 16] sequence along one fixed direction is the third latent plus noise.

label = clip(part_text + part_audio + part_vision, -3, 3), rounded to thirds as in CMU-MOSEI (mean of three raters).
The words are spoken by a synthesiser (`tools.speech`), so the audio holds the words as well as the prosody: a model
that is given no transcript can win back `part_text` by listening.
"""

from __future__ import annotations

import csv
import math
import multiprocessing
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
from rich.progress import track

from sharding.errors import UserError
from sharding.shard_writer import refuse_existing
from sharding.signals import interrupt_blocked
from tools import speech

# Valence of an opinion word, in label units. Few words, far apart in sound, each frequent: a small model must learn to
# hear them from about a thousand clips.
VALENCE = {
    **dict.fromkeys(("superb", "magnificent", "wonderful", "fantastic"), 3),
    **dict.fromkeys(("lovely", "gorgeous", "brilliant", "excellent"), 2),
    **dict.fromkeys(("decent", "pleasant", "solid", "neat"), 1),
    **dict.fromkeys(("dull", "clumsy", "bland", "tedious"), -1),
    **dict.fromkeys(("ugly", "boring", "shabby", "annoying"), -2),
    **dict.fromkeys(("horrible", "atrocious", "disgusting", "pathetic"), -3),
}
SUBJECTS = (
    *("the acting", "the story", "the music", "the ending", "the camera work", "the dialogue", "the first half"),
    *("the phone", "the screen", "the sound", "the cover", "the hotel", "the service", "the room", "the food"),
)
OPINIONS = ("{s} was {w}", "{s} felt {w}", "{s} seemed {w}", "I found {s} {w}", "I would call {s} {w}")
FILLERS = (
    *("you know", "I mean", "well", "so there it is", "let me see", "that is about it", "anyway"),
    *("it came out last year", "we went on a Tuesday", "I am in my kitchen", "it has two parts", "I read the book"),
    *("I watched it with my brother", "it takes about two hours", "we sat near the window", "it comes in a brown box"),
    *("my sister told me about it", "the shop is near the station", "there are six of them in the family"),
    *("I had a cup of tea before that", "I wrote down a few notes for this", "it was filmed in the north of Spain"),
    *("we took the bus from the other side of town", "somebody asked me about it in the comments last week"),
    *("the man at the desk gave us a key and a map", "I looked at it again on Sunday in the afternoon"),
)

# The weights share the label's variance so that each part is informative alone and none is sufficient.
WORD_SHARE, PROSODY_SHARE, FACE_SHARE = 0.50, 0.65, 0.70  # label units per unit of valence, latent, latent
LATENT_CORRELATION = 0.15
WORD_REACH = 3.5  # the wanted valence is uniform over ± this; beyond 3 the strongest words get their share
WORD_JITTER = 0.7  # how far a chosen word strays from the wanted valence, in valence units
LENGTH_SIGMA = 0.5  # of log seconds; short clips round to whole clauses, which adds about 0.05
SECONDS = (1.0, 60.0)  # range of target lengths
TEXT_MISSING, VISION_MISSING = 0.10, 0.03
FACE_WIDTH, FACE_RATE = 16, 4.0  # features, frames per second
SAMPLES_PER_SHARD = 128
SPLITS = (("train", 0.7), ("valid", 0.1), ("test", 0.2))


@dataclass(frozen=True)
class Row:
    """One line of manifest.csv. Paths are relative to it; an empty path or text is an absent modality.

    The three parts and the voice are for analysis; no model may read them.
    """

    key: str
    audio: str
    text: str
    vision: str
    label: float
    split: str
    part_text: float
    part_audio: float
    part_vision: float
    voice: str


def generate(out: Path, *, clips: int, seed: int, workers: int, mean_seconds: float = 7.3) -> Path:
    """Write a corpus of `clips` clips: out/manifest.csv, out/audio/*.wav (16 kHz PCM16), out/vision/*.npy ([T, 16]).

    A pure function of (clips, seed, mean_seconds): the same bytes whatever the number of `workers` processes.

    Args:
        mean_seconds: mean clip length; lengths are log-normal with sigma 0.5 to 0.6, in seconds (CMU-MOSEI: 7.3).

    Returns:
        The path of the manifest (columns: see `Row`).

    Raises:
        UserError: a setting is out of range, the synthesiser is missing, or `out` cannot be written.
    """
    for name, value, least in (("clips", clips, 10), ("workers", workers, 1), ("mean_seconds", mean_seconds, 2)):
        if not value >= least:
            raise UserError(name, f"{value} is too small", f"Use at least {least}")
    speech.require()
    plan = _plan(clips, seed)
    make = partial(_make_clip, out, seed, mean_seconds)
    try:
        for folder in ("audio", "vision"):
            (out / folder).mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            rows: Iterator[Row]
            if workers == 1:
                rows = map(make, plan)
            else:
                # spawn: a fork of a process that has used torch may inherit a held lock
                context = multiprocessing.get_context("spawn")
                pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=context))
                with interrupt_blocked():  # mapping starts the workers
                    rows = pool.map(make, plan, chunksize=8)
            finished = list(track(rows, description="speaking clips", total=clips))
        manifest = out / "manifest.csv"
        with manifest.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in finished)
    except OSError as error:
        raise UserError(
            str(error.filename or out), f"cannot be written: {error.strerror}", "Choose another directory"
        ) from error
    return manifest


def make_demo(out: Path, *, clips: int, seed: int, workers: int, mean_seconds: float) -> None:
    """Generate a corpus in a temporary directory and write it as shards to `out`.

    Raises:
        UserError: see `generate` and `tools.shards.make`.
    """
    from tools import shards  # noqa: PLC0415 (it loads much that the generator alone does not need)

    refuse_existing(out)  # before minutes of work
    with tempfile.TemporaryDirectory(prefix="dist-train-demo-") as folder:
        manifest = generate(Path(folder), clips=clips, seed=seed, workers=workers, mean_seconds=mean_seconds)
        making = shards.Making(workers, SAMPLES_PER_SHARD, on_bad_sample="stop", label_range=(-3.0, 3.0))
        shards.make(manifest, out, making)


@dataclass(frozen=True)
class _Place:
    """What a clip is given by its place in the corpus: exact shares of the splits, balanced voices in each."""

    index: int
    split: str
    voice: str


def _plan(clips: int, seed: int) -> list[_Place]:
    order = np.random.default_rng([seed, clips]).permutation(clips)
    bounds = np.cumsum([share for _, share in SPLITS]) * clips
    places = []
    for index, position in enumerate(order):
        split = SPLITS[int(np.searchsorted(bounds, position + 0.5))][0]
        places.append(_Place(index, split, speech.VOICES[position % len(speech.VOICES)]))
    return places


def _make_clip(out: Path, seed: int, mean_seconds: float, place: _Place) -> Row:
    """Draw, speak and write one clip; depends on nothing but its arguments."""
    rng = np.random.default_rng([seed, place.index])
    common = np.sqrt(LATENT_CORRELATION) * rng.normal()
    word, prosody, face = common + np.sqrt(1 - LATENT_CORRELATION) * rng.normal(size=3)
    knobs = _prosody(prosody, rng)
    log_mean = np.log(mean_seconds) - LENGTH_SIGMA**2 / 2
    seconds = float(np.clip(rng.lognormal(log_mean, LENGTH_SIGMA), *SECONDS))
    text, valence = _words(WORD_REACH * math.erf(word / math.sqrt(2)), seconds, knobs["rate"], rng)
    waveform = speech.say(text, place.voice, **knobs)
    frames = _face(face, len(waveform) / speech.SAMPLE_RATE, speech.VOICES.index(place.voice), rng)
    has_text, has_vision = rng.random() >= TEXT_MISSING, rng.random() >= VISION_MISSING

    key = f"clip{place.index:05d}"
    audio_path, vision_path = f"audio/{key}.wav", f"vision/{key}.npy"
    soundfile.write(out / audio_path, waveform, speech.SAMPLE_RATE, subtype="PCM_16")
    if has_vision:
        np.save(out / vision_path, frames)
    parts = (round(WORD_SHARE * valence, 6), round(PROSODY_SHARE * prosody, 6), round(FACE_SHARE * face, 6))
    return Row(
        key=key,
        audio=audio_path,
        text=text if has_text else "",
        vision=vision_path if has_vision else "",
        label=round(round(3 * float(np.clip(sum(parts), -3, 3))) / 3, 6),
        split=place.split,
        part_text=parts[0],
        part_audio=parts[1],
        part_vision=parts[2],
        voice=place.voice,
    )


def _prosody(latent: float, rng: np.random.Generator) -> dict[str, int]:
    """Settings of the synthesiser; each rises with `latent` and has noise of its own."""

    def knob(centre: float, slope: float, noise: float, low: int, high: int) -> int:
        return int(np.clip(round(centre + slope * latent + noise * rng.normal()), low, high))

    return {
        "rate": knob(175, 20, 6, 125, 235),
        "pitch": knob(50, 13, 5, 15, 90),
        "pitch_range": knob(50, 18, 8, 5, 100),
        "volume": knob(90, 18, 6, 40, 150),
    }


def _words(wanted: float, seconds: float, rate: int, rng: np.random.Generator) -> tuple[str, float]:
    """A text of about `seconds` at `rate` words per minute, and the mean valence of its 1 to 4 opinion words."""
    vocabulary, values = np.array(list(VALENCE)), np.array(list(VALENCE.values()), dtype=float)
    odds = np.exp(-((values - wanted) ** 2) / (2 * WORD_JITTER**2))
    count = int(np.clip(rng.binomial(4, 0.6), 1, max(1, seconds // 1.4)))
    chosen = rng.choice(len(values), size=count, replace=False, p=odds / odds.sum())
    clauses = [
        str(rng.choice(OPINIONS)).format(s=subject, w=word)
        for subject, word in zip(rng.choice(SUBJECTS, size=count, replace=False), vocabulary[chosen], strict=True)
    ]
    if seconds < 1.5:
        clauses = [f"it was {vocabulary[chosen[0]]}"]
    missing = seconds - sum(_spoken_seconds(clause, rate) for clause in clauses)
    unused: list[str] = []
    while missing > _spoken_seconds(min(FILLERS, key=len), rate) / 2:
        unused = unused or list(FILLERS)  # no clause comes twice before every clause has come once
        fitting = [clause for clause in unused if _spoken_seconds(clause, rate) < 1.2 * missing]
        filler = str(rng.choice(fitting)) if fitting else min(unused, key=len)
        unused.remove(filler)
        clauses.insert(int(rng.integers(len(clauses) + 1)), filler)
        missing -= _spoken_seconds(filler, rate)
    sentences = ". ".join(clause[0].upper() + clause[1:] for clause in clauses) + "."
    return sentences, float(values[chosen].mean())


def _spoken_seconds(clause: str, rate: int) -> float:
    """Length of a spoken clause with its pause; the two constants are a least-squares fit over all voices."""
    return (8.5 * (len(clause) + 2) + 54.0) / rate


def _face(latent: float, seconds: float, voice: int, rng: np.random.Generator) -> np.ndarray:
    """Face features, float32 [T, 16]: `latent` along a fixed direction, a speaker's offset, autocorrelated noise."""
    frames = max(2, round(seconds * FACE_RATE))
    fixed = np.random.default_rng(16)  # the direction and the speakers belong to the corpus's design, not to a seed
    direction = fixed.normal(size=FACE_WIDTH)
    direction /= np.sqrt((direction**2).sum())
    offset = fixed.normal(size=(len(speech.VOICES), FACE_WIDTH))[voice]
    offset -= (offset * direction).sum() * direction
    drift = np.zeros((frames, FACE_WIDTH))
    drift[0] = rng.normal(size=FACE_WIDTH)
    for t in range(1, frames):
        drift[t] = 0.8 * drift[t - 1] + 0.6 * rng.normal(size=FACE_WIDTH)  # AR(1) of unit variance
    carried = latent + 0.4 * rng.normal()
    sequence = carried * direction + offset + 0.4 * drift + 0.3 * rng.normal(size=(frames, FACE_WIDTH))
    return sequence.astype(np.float32)
