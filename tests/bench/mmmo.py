"""Audio and vision alone on real reviews (MMMO features): the missing flow against ridge regression, by seed.

    python tests/bench/mmmo.py mfn_mmmo.npz [--seeds 0 1 2] [--output runs/mmmo_bench] [KEY=VALUE …]

The archive (the MFN authors', MIT) has audio [340, 20, 74], video [340, 20, 36], label, split, and text for validation
and test alone, which is left out here: no clip to learn from has any. Each column is standardised over the training
clips. Ridge reads each column pooled over time, in three ways; its strength is chosen on the validation split, as the
checkpoint is. Prints test MAE and Pearson r of both, and the constant-median floor.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dist_train.metrics import floors, valence_metrics
from sharding.shard_writer import pack_sample, write_dataset
from sharding.shards import Dims, Split

SPLITS: dict[str, Split] = {"train": "train", "val": "valid", "test": "test"}
POOLS: dict[str, list[Callable[..., np.ndarray]]] = {
    "mean": [np.mean],
    "mean and deviation": [np.mean, np.std],
    "mean, deviation, extremes": [np.mean, np.std, np.max, np.min],
}
STRENGTHS = 10.0 ** np.arange(-1, 6)


def standardised(archive: Path) -> dict[str, np.ndarray]:
    """The arrays, audio and video with mean 0 and deviation 1 over the training clips."""
    with np.load(archive, allow_pickle=False) as file:
        data = {name: file[name] for name in ("audio", "video", "label", "split")}
    train = data["split"] == "train"
    for name in ("audio", "video"):
        values = data[name].astype(np.float64)
        mean, deviation = values[train].mean((0, 1)), values[train].std((0, 1))
        data[name] = ((values - mean) / np.where(deviation > 1e-6, deviation, 1.0)).astype(np.float32)
    return data


def write_shards(data: dict[str, np.ndarray], out: Path) -> None:
    """Shards of audio and vision features."""
    dims = Dims(audio=data["audio"].shape[2], text=None, vision=data["video"].shape[2])
    with write_dataset(out, dims=dims, label_range=(-3.0, 3.0), samples_per_shard=500) as writer:
        for index, (name, label) in enumerate(zip(data["split"], data["label"], strict=True)):
            split = SPLITS[str(name)]
            arrays = {"audio": data["audio"][index], "vision": data["video"][index]}
            writer.add(split, pack_sample(f"clip{index:03d}", float(label), split, **arrays))


def ridge(data: dict[str, np.ndarray], pools: Sequence[Callable[..., np.ndarray]]) -> dict[str, float | None]:
    """Test metrics of ridge regression on pooled features."""
    x = np.concatenate([pool(data[name].astype(np.float64), 1) for name in ("audio", "video") for pool in pools], 1)
    train, valid, test = (data["split"] == name for name in SPLITS)
    x = (x - x[train].mean(0)) / np.maximum(x[train].std(0), 1e-6)
    y, middle = data["label"].astype(np.float64), data["label"][train].mean()

    def fitted(strength: float) -> np.ndarray:
        gram = x[train].T @ x[train] + strength * np.eye(x.shape[1])
        return x @ np.linalg.solve(gram, x[train].T @ (y[train] - middle)) + middle

    best = min(map(fitted, STRENGTHS), key=lambda said: abs(said - y)[valid].mean())
    return valence_metrics(best[test], y[test])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/mmmo_bench"))
    parser.add_argument("override", nargs="*", help="recipe overrides of all runs")
    arguments = parser.parse_intermixed_args()
    data, shards = standardised(arguments.archive), arguments.output / "shards"
    if not shards.exists():
        arguments.output.mkdir(parents=True, exist_ok=True)
        write_shards(data, shards)
    rows: list[tuple[str, dict[str, float | None]]] = []
    for seed in arguments.seeds:
        run = arguments.output / f"seed={seed}"
        if not (run / "summary.json").is_file():
            overrides = [f"data.path={shards}", f"seed={seed}", *arguments.override]
            command = [sys.executable, "-m", "dist_train.cli", "train", "recipes/mmmo_audio_vision.yaml", *overrides]
            subprocess.run([*command, "--output", str(run), "--ranks", "1"], check=True, stdout=subprocess.DEVNULL)
        rows.append((f"seed {seed}", json.loads((run / "summary.json").read_text())["test"]["missing"]))
    label = {name: data["label"][data["split"] == name] for name in SPLITS}
    rows += [(f"ridge regression on {name}", ridge(data, pools)) for name, pools in POOLS.items()]
    rows.append(("floor", floors(label["train"], label["test"])))
    print("| | test MAE | Pearson r |\n|---|---|---|")
    for name, scores in rows:
        values = [scores.get("mae"), scores.get("corr")]
        print(f"| {name} | {' | '.join('–' if value is None else f'{value:.3f}' for value in values)} |")


if __name__ == "__main__":
    main()
