"""Real recordings and real feature arrays, when the folder `shared` with them lies beside the checkout."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = (ROOT / ".." / "shared" / "data").resolve()

# EmoDB's ten sentences (Burkhardt et al., Interspeech 2005).
SENTENCES = {
    "a01": "Der Lappen liegt auf dem Eisschrank.",
    "a02": "Das will sie am Mittwoch abgeben.",
    "a04": "Heute abend könnte ich es ihm sagen.",
    "a05": "Das schwarze Stück Papier befindet sich da oben neben dem Holzstück.",
    "a07": "In sieben Stunden wird es soweit sein.",
    "b01": "Was sind denn das für Tüten, die da unter dem Tisch stehen?",
    "b02": "Sie haben es gerade hochgetragen und jetzt gehen sie wieder runter.",
    "b03": "An den Wochenenden bin ich jetzt immer nach Hause gefahren und habe Agnes besucht.",
    "b09": "Ich will das eben wegbringen und dann mit Karl was trinken gehen.",
    "b10": "Die wird auf dem Platz sein, wo wir sie immer hinlegen.",
}
VALENCE = {"F": 2.0, "N": 0.0, "L": -1.0, "T": -2.0, "A": -2.0, "E": -2.0, "W": -2.5}  # stated in recipes/emodb.yaml
EMODB_SPLITS = {"13": "valid", "14": "valid", "15": "test", "16": "test"}  # by speaker, the others train


def run(*words: str | Path) -> str:
    """Standard output of a command that must succeed."""
    command = [sys.executable, "-m", "dist_train.cli", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done.stdout


def write_manifest(folder: Path, rows: list[dict[str, Any]]) -> Path:
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return folder / "manifest.csv"


def predictions(output: Path, split: str) -> list[dict[str, str]]:
    with (output / f"predictions_{split}.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "emodb_flac").is_dir(), reason="the EmoDB recordings are not beside the checkout")
def test_emodb(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for path in sorted((DATA / "emodb_flac").glob("*.flac")):
        speaker, sentence, emotion = path.stem[:2], path.stem[2:5], path.stem[5]
        np.save(tmp_path / f"{path.stem}.npy", rng.normal(size=(rng.integers(10, 40), 8)).astype(np.float32))
        rows.append({
            "key": path.stem, "audio": path, "text": SENTENCES[sentence], "vision": f"{path.stem}.npy",
            "label": VALENCE[emotion], "split": EMODB_SPLITS.get(speaker, "train"), "speaker": speaker,
        })  # fmt: skip
    shards, output = tmp_path / "shards", tmp_path / "run"
    run("shards", "make", write_manifest(tmp_path, rows), shards)
    assert "69 samples" in run("shards", "verify", shards)
    found = json.loads(run("shards", "inspect", shards, "--json"))
    assert {split: part["samples"] for split, part in found["splits"].items()} == {"train": 41, "valid": 14, "test": 14}
    recipe = ROOT / "recipes/emodb.yaml"
    run("train", recipe, f"data.path={shards}", "training.epochs=2", "--output", output, "--ranks", "2")
    scores = json.loads(run("evaluate", output, "--ranks", "1", "--json"))
    summary = json.loads((output / "summary.json").read_text())
    for flow in ("complete", "missing"):
        assert scores[flow] == pytest.approx(summary["test"][flow], abs=1e-4)
        values = [float(row[flow]) for row in predictions(output, "test")]
        assert np.isfinite(values).all() and np.std(values) > 0
    assert Path(run("report", output).strip()).stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "mfn_mmmo.npz").is_file(), reason="the MMMO features are not beside the checkout")
def test_mmmo_features_without_any_text_to_learn_from(tmp_path: Path) -> None:
    with np.load(DATA / "mfn_mmmo.npz", allow_pickle=False) as archive:
        data = dict(archive)
    train = data["split"] == "train"
    assert not data["has_text"][train].any() and data["has_text"][~train].all()
    raw = write_arrays(tmp_path / "raw", data)
    assert "columns of audio are of very different scale" in run("shards", "make", raw, tmp_path / "raw_shards")
    for name, rows in (("audio", train), ("video", train), ("text_glove300", ~train)):
        values = data[name].astype(np.float64)
        mean, deviation = values[rows].mean((0, 1)), values[rows].std((0, 1))
        data[name] = (values - mean) / np.where(deviation > 1e-6, deviation, 1.0)
    shards, output = tmp_path / "shards", tmp_path / "run"
    assert "very different scale" not in run("shards", "make", write_arrays(tmp_path / "even", data), shards)
    recipe = ROOT / "recipes/mmmo_features.yaml"
    run("train", recipe, f"data.path={shards}", "training.epochs=4", "--output", output, "--ranks", "2")
    run("evaluate", output, "--ranks", "1")
    summary = json.loads((output / "summary.json").read_text())
    notes = " ".join(summary["notes"])
    assert "No training clip has text" in notes and "nothing from text" in notes
    assert {row["has_text"] for row in predictions(output, "test")} == {"1"}
    assert all(np.isfinite(summary["test"][flow]["mae"]) for flow in ("complete", "missing"))


def write_arrays(folder: Path, data: dict[str, np.ndarray]) -> Path:
    """A manifest of .npy files."""
    folder.mkdir()
    rows = []
    for i, split in enumerate(data["split"]):
        row = {"key": f"clip{i:03d}", "label": float(data["label"][i]), "split": {"val": "valid"}.get(split, split)}
        for column, name in (("audio", "audio"), ("vision", "video"), ("text_features", "text_glove300")):
            here = column != "text_features" or data["has_text"][i]
            row[column] = f"{column}{i}.npy" if here else ""
            if here:
                np.save(folder / row[column], data[name][i])
        rows.append(row)
    return write_manifest(folder, rows)
