"""Emotion from real voices whose speakers are unheard (Berlin EmoDB): audio alone against logistic regression, by seed.

    python tests/bench/emodb.py FOLDER [--seeds 0 1 2] [--output runs/emodb_bench] [KEY=VALUE …]

FOLDER has sound files as EmoDB names them: speaker (2 digits), sentence (3), emotion (a letter), take. Five folds, each
with two of ten speakers to test and the next two to validate; shards are made from a manifest with `--classes`.
Logistic regression (scikit-learn) reads mean and deviation over time of 64 log-mel bands; its strength is chosen on the
validation speakers, as the checkpoint is. Every clip is tested once: prints accuracy, macro-F1 and unweighted average
recall over the clips of all folds, and the floor, the commonest class of each fold's training clips.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import soundfile
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from dist_train.metrics import Metrics, class_metrics

EMOTIONS = {
    "W": "anger", "L": "boredom", "E": "disgust", "A": "anxiety", "F": "happiness", "T": "sadness", "N": "neutral",
}  # fmt: skip
CLASSES = list(EMOTIONS.values())
FOLDS, BANDS, RATE = 5, 64, 16_000
STRENGTHS = 10.0 ** np.arange(-4, 3)
DIST_TRAIN = (sys.executable, "-m", "dist_train.cli")
SHOWN = ("accuracy", "macro_f1", "uar")


def splits(files: list[Path], fold: int) -> dict[str, list[Path]]:
    """Files by split: two speakers in turn to test, the next two to validate."""
    speakers = sorted({file.name[:2] for file in files})
    parts = [speakers[number::FOLDS] for number in range(FOLDS)]
    test, valid = parts[fold], parts[(fold + 1) % FOLDS]
    named = {"test": test, "valid": valid, "train": [one for one in speakers if one not in test + valid]}
    return {split: [file for file in files if file.name[:2] in of] for split, of in named.items()}


def label(file: Path) -> int:
    """The class that a file's name tells."""
    return CLASSES.index(EMOTIONS[file.stem[5]])


def make_shards(parts: dict[str, list[Path]], directory: Path) -> Path:
    """Shards of a fold, as a user makes them."""
    directory.mkdir(parents=True, exist_ok=True)
    manifest, shards = directory / "manifest.csv", directory / "shards"
    with manifest.open("w", newline="", encoding="utf-8") as out:
        table = csv.writer(out)
        table.writerow(["key", "audio", "label", "split"])
        for split, files in parts.items():
            table.writerows([file.stem, file.resolve(), CLASSES[label(file)], split] for file in files)
    command = [*DIST_TRAIN, "shards", "make", str(manifest), str(shards), "--classes", ",".join(CLASSES)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return shards


def pooled(file: Path) -> np.ndarray:
    """[2 * BANDS] mean and deviation over time of log-mel bands (25 ms windows, 10 ms steps)."""
    audio, rate = soundfile.read(file)
    assert rate == RATE, f"{file} has {rate} Hz"
    bank = mel_filter_bank(257, BANDS, 0.0, RATE / 2, RATE, norm="slaney", mel_scale="slaney")
    bands = spectrogram(
        audio, window_function(400, "hann"), 400, 160, fft_length=512, power=2.0, mel_filters=bank, log_mel="log10"
    )
    return np.concatenate([bands.mean(1), bands.std(1)])


def regression(parts: dict[str, list[Path]]) -> np.ndarray:
    """[n] classes of the test files by logistic regression; strength by macro-F1 on the validation files."""
    x = {split: np.stack([pooled(file) for file in files]) for split, files in parts.items()}
    y = {split: np.array([label(file) for file in files]) for split, files in parts.items()}
    fitted = [
        make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000)).fit(x["train"], y["train"])
        for strength in STRENGTHS
    ]
    valid = [class_metrics(one.predict(x["valid"]), y["valid"], len(CLASSES))["macro_f1"] or 0.0 for one in fitted]
    return np.asarray(fitted[int(np.argmax(valid))].predict(x["test"]))


def trained(run: Path, shards: Path, seed: int, overrides: list[str]) -> dict[str, int]:
    """Class by key of the test clips, of a run that is trained unless it is there."""
    if not (run / "summary.json").is_file():
        command = [
            *DIST_TRAIN,
            "train",
            "recipes/emodb_classes.yaml",
            f"data.path={shards}",
            f"seed={seed}",
            *overrides,
        ]
        subprocess.run([*command, "--output", str(run), "--ranks", "1"], check=True, stdout=subprocess.DEVNULL)
    with (run / "predictions_test.csv").open(newline="", encoding="utf-8") as file:
        return {row["key"]: int(row["missing"]) for row in csv.DictReader(file)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/emodb_bench"))
    parser.add_argument("override", nargs="*", help="recipe overrides of all runs")
    arguments = parser.parse_intermixed_args()
    files = sorted(file for file in arguments.folder.iterdir() if file.suffix in (".flac", ".wav"))
    said: dict[str, dict[str, int]] = {}
    for fold in range(FOLDS):
        parts, directory = splits(files, fold), arguments.output / f"fold={fold}"
        shards = directory / "shards"
        if not shards.exists():
            make_shards(parts, directory)
        keys = [file.stem for file in parts["test"]]
        for seed in arguments.seeds:
            found = trained(directory / f"seed={seed}", shards, seed, arguments.override)
            said.setdefault(f"seed {seed}", {}).update(found)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            guess = regression(parts).tolist()
        said.setdefault("logistic regression on log-mel bands", {}).update(zip(keys, guess, strict=True))
        commonest = int(np.bincount([label(file) for file in parts["train"]], minlength=len(CLASSES)).argmax())
        said.setdefault("floor: commonest class", {}).update(dict.fromkeys(keys, commonest))
    true = {file.stem: label(file) for file in files}
    print(f"{len(true)} clips, each tested once\n\n| | accuracy | macro-F1 | UAR |\n|---|---|---|---|")
    for name, of in said.items():
        scores: Metrics = class_metrics([of[key] for key in true], list(true.values()), len(CLASSES))
        print(f"| {name} | {' | '.join(f'{scores[column]:.3f}' for column in SHOWN)} |")


if __name__ == "__main__":
    main()
