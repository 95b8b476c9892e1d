"""The embedded corpus: each modality informative, none sufficient; a pure function of its seed; shaped like MOSEI."""

import csv
import hashlib
import itertools
import math
import re
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sharding.errors import UserError
from tools.demo_corpus import SPLITS, VALENCE, generate, make_demo

pytest.importorskip("espeakng_loader")

ROOT = Path(__file__).resolve().parents[2]
CLIPS, SEED, MEAN_SECONDS = 600, 11, 4.0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    manifest = generate(tmp_path_factory.mktemp("corpus"), clips=CLIPS, seed=SEED, workers=2, mean_seconds=MEAN_SECONDS)
    with manifest.open(encoding="utf-8") as file:
        return manifest.parent, list(csv.DictReader(file))


def labels(rows: list[dict[str, str]]) -> np.ndarray:
    return np.array([float(row["label"]) for row in rows])


def bag_of_words(rows: list[dict[str, str]]) -> np.ndarray:
    """Share of each word in the transcript; the vocabulary is the transcripts' own, not the generator's list."""
    counts = [Counter(re.findall("[a-z]+", row["text"].lower())) for row in rows]
    words = sorted(set().union(*counts))
    return np.array([[count[word] / max(1, count.total()) for word in words] for count in counts])


def prosody(waveform: np.ndarray) -> list[float]:
    """Loudness, brightness, pitch, pitch spread, syllable rate, pauses; nothing that knows the words. 16 kHz in."""
    hop = 400  # 25 ms
    frames = waveform[: len(waveform) // hop * hop].reshape(-1, hop)
    energy = np.sqrt((frames**2).mean(1)) + 1e-5
    loud = energy > 0.3 * energy.max()
    crossings = (np.diff(np.sign(frames), axis=1) != 0).mean(1)
    periods = []
    for start in np.flatnonzero(loud) * hop:
        window = waveform[start : start + 2 * hop] * np.hanning(len(waveform[start : start + 2 * hop]))
        spectrum = np.abs(np.fft.rfft(window, 2048)) ** 2
        correlation = np.fft.irfft(spectrum)[40:228]  # lags of 70 to 400 Hz
        periods.append(40 + int(correlation.argmax()))
    pitch = np.log2(16_000 / np.array(periods))
    smooth = np.convolve(energy, np.ones(3) / 3, "same")
    peaks = (smooth[1:-1] > smooth[:-2]) & (smooth[1:-1] >= smooth[2:]) & (smooth[1:-1] > 0.4 * smooth.max())
    spread = np.percentile(pitch, 90) - np.percentile(pitch, 10)
    return [
        float(np.log(energy[loud].mean())),
        float(crossings[loud].mean()),
        float(np.median(pitch)),
        float(spread),
        float(peaks.sum() / len(energy)),
        float(loud.mean()),
    ]


def held_out_mae(features: np.ndarray, target: np.ndarray, train: np.ndarray, test: np.ndarray) -> float:
    """MAE on `test` of a ridge regression whose strength is chosen by 5 folds within `train`."""
    features = (features - features[train].mean(0)) / (features[train].std(0) + 1e-9)
    features = np.c_[features, np.ones(len(features))]

    def error(fit: np.ndarray, judge: np.ndarray, strength: float) -> float:
        gram = features[fit].T @ features[fit] + strength * np.eye(features.shape[1])
        weights = np.linalg.solve(gram, features[fit].T @ target[fit])
        return float(np.abs(features[judge] @ weights - target[judge]).mean())

    folds = [(np.delete(train, np.s_[k::5]), train[k::5]) for k in range(5)]
    best = min((1.0, 10.0, 100.0, 1000.0), key=lambda s: sum(error(fit, judge, s) for fit, judge in folds))
    return error(train, test, best)


def probe(corpus: tuple[Path, list[dict[str, str]]]) -> dict[str, float]:
    """Held-out MAE over the floor's MAE, for every set of modalities; on the clips that have all three."""
    folder, every = corpus
    rows = [row for row in every if row["text"] and row["vision"]]
    target = labels(rows)
    views = {
        "text": bag_of_words(rows),
        "audio": np.array([prosody(soundfile.read(folder / row["audio"])[0]) for row in rows]),
        "vision": np.array([np.load(folder / row["vision"]).mean(0) for row in rows]),
    }
    # halves of the whole corpus: the corpus's own test split is too small for a steady estimate
    order = np.random.default_rng(0).permutation(len(rows))
    train, test = order[: len(rows) // 2], order[len(rows) // 2 :]
    floor = float(np.abs(target[test] - np.median(target[train])).mean())
    return {"floor": floor} | {
        "+".join(names): held_out_mae(np.hstack([views[name] for name in names]), target, train, test) / floor
        for size in (1, 2, 3)
        for names in itertools.combinations(views, size)
    }


def tree_digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_each_modality_informs_and_none_suffices(corpus: tuple[Path, list[dict[str, str]]]) -> None:
    ratio = probe(corpus)
    for alone in ("text", "audio", "vision"):
        assert 0.55 < ratio[alone] < 0.93, ratio
    for pair in ("text+audio", "text+vision", "audio+vision"):
        assert ratio["text+audio+vision"] < ratio[pair] - 0.08, ratio
        assert ratio[pair] < min(ratio[name] for name in pair.split("+")), ratio
    assert ratio["text+audio+vision"] < 0.45, ratio


def test_labels_are_the_rounded_sum_of_their_parts(corpus: tuple[Path, list[dict[str, str]]]) -> None:
    _, rows = corpus
    for row in rows:
        total = sum(float(row[f"part_{name}"]) for name in ("text", "audio", "vision"))
        assert abs(float(row["label"]) - max(-3, min(3, total))) <= 1 / 6 + 1e-5
        assert abs(3 * float(row["label"]) - round(3 * float(row["label"]))) < 1e-5
    shares = np.array(list(Counter(labels(rows)).values())) / len(rows)
    assert (shares**2).sum() > 0.05  # two clips share a label this often: as heavy as 19 levels allow
    spoken = [row for row in rows if row["text"]]
    heard = [[VALENCE[w] for w in re.findall("[a-z]+", row["text"].lower()) if w in VALENCE] for row in spoken]
    assert {len(values) for values in heard} == {1, 2, 3, 4}
    valence = [sum(values) / len(values) for values in heard]
    slope = np.array([float(row["part_text"]) for row in spoken]) @ valence / (np.array(valence) @ valence)
    np.testing.assert_allclose([float(row["part_text"]) for row in spoken], slope * np.array(valence), atol=1e-5)


def test_every_opinion_word_is_frequent(corpus: tuple[Path, list[dict[str, str]]]) -> None:
    counts = Counter(word for row in corpus[1] for word in re.findall("[a-z]+", row["text"].lower()))
    assert min(counts[word] for word in VALENCE) >= CLIPS // 50, counts


def test_lengths_spread_as_asked(corpus: tuple[Path, list[dict[str, str]]], tmp_path: Path) -> None:
    folder, rows = corpus
    seconds = np.array([soundfile.info(folder / row["audio"]).duration for row in rows])
    assert abs(seconds.mean() / MEAN_SECONDS - 1) < 0.1
    assert 0.45 < np.log(seconds).std() < 0.65
    assert abs(np.corrcoef(seconds, labels(rows))[0, 1]) < 0.15  # the length alone gives nothing away
    longer = generate(tmp_path, clips=60, seed=3, workers=1, mean_seconds=7.3).parent
    assert 5.8 < np.mean([soundfile.info(path).duration for path in (longer / "audio").iterdir()]) < 9.0


def test_missing_modalities_and_splits(corpus: tuple[Path, list[dict[str, str]]]) -> None:
    folder, rows = corpus
    assert 0.06 < np.mean([not row["text"] for row in rows]) < 0.15
    assert 0.01 < np.mean([not row["vision"] for row in rows]) < 0.06
    counts = Counter(row["split"] for row in rows)
    assert all(abs(counts[split] - share * len(rows)) <= 1 for split, share in SPLITS)
    voices = {split: {row["voice"] for row in rows if row["split"] == split} for split in counts}
    assert all(len(names) == 6 for names in voices.values()), voices
    named = {row["audio"] for row in rows} | {row["vision"] for row in rows if row["vision"]}
    assert set(tree_digest(folder)) == named | {"manifest.csv"}


def test_files_hold_what_the_manifest_promises(corpus: tuple[Path, list[dict[str, str]]]) -> None:
    folder, rows = corpus
    for row in rows[::7]:
        info = soundfile.info(folder / row["audio"])
        assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
        waveform = soundfile.read(folder / row["audio"])[0]
        assert 0.01 < np.sqrt((waveform**2).mean()) < 0.3
        assert (np.abs(waveform) > 0.999).mean() < 1e-3
        if row["vision"]:
            frames = np.load(folder / row["vision"], allow_pickle=False)
            assert frames.dtype == np.float32
            assert frames.shape[1:] == (16,)
            assert abs(len(frames) - 4 * info.duration) <= 2
            assert np.isfinite(frames).all()


def test_same_bytes_for_any_workers_and_process(tmp_path: Path) -> None:
    seed = int(np.random.default_rng().integers(1_000_000))
    alone, pooled, elsewhere, other = (tmp_path / name for name in ("alone", "pooled", "elsewhere", "other"))
    generate(alone, clips=20, seed=seed, workers=1, mean_seconds=2.5)
    generate(pooled, clips=20, seed=seed, workers=3, mean_seconds=2.5)
    generate(other, clips=20, seed=seed + 1, workers=1, mean_seconds=2.5)
    script = (
        "from pathlib import Path; from tools.demo_corpus import generate; "
        f"generate(Path({str(elsewhere)!r}), clips=20, seed={seed}, workers=1, mean_seconds=2.5)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
    assert tree_digest(alone) == tree_digest(pooled) == tree_digest(elsewhere), seed
    assert not set(tree_digest(alone).values()) & set(tree_digest(other).values()), seed


@pytest.mark.parametrize(
    ("clips", "workers", "mean_seconds", "named"),
    [(3, 1, 4.0, "clips"), (20, 0, 4.0, "workers"), (20, 1, 0.5, "mean_seconds"), (20, 1, math.nan, "mean_seconds")],
)
def test_settings_out_of_range(tmp_path: Path, clips: int, workers: int, mean_seconds: float, named: str) -> None:
    with pytest.raises(UserError) as caught:
        generate(tmp_path, clips=clips, seed=0, workers=workers, mean_seconds=mean_seconds)
    assert caught.value.where == named


def test_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match="taken"):
        generate(tmp_path / "taken", clips=20, seed=0, workers=1)


def test_demo_becomes_shards(tmp_path: Path) -> None:
    for workers in (1, 2):
        make_demo(tmp_path / str(workers), clips=20, seed=5, workers=workers, mean_seconds=2.0)
    one, two = (tree_digest(tmp_path / str(workers)) for workers in (1, 2))
    assert one == two
    assert "dataset.json" in one
    with tarfile.open(next((tmp_path / "1").glob("train-*.tar"))) as tar:
        kinds = {name.split(".", 1)[1] for name in tar.getnames()}
    assert {"wav", "txt", "json"} <= kinds
