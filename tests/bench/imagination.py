"""Does imagining text help? The quickstart with imagination (simulated text + MIA) and with it switched off, by seed.

    dist-train shards demo data/demo
    python tests/bench/imagination.py [--recipe recipes/quickstart.yaml] [--seeds 0 1 2] [--output runs/imagination]

Each run is `dist-train train RECIPE seed=S … --ranks 2`, one after another; a finished one in --output is not repeated.
Prints test MAE over the constant-median floor, per seed, and the verdict: the mean gain of the missing flow against the
larger spread (max - min over seeds) of the two columns. Exit code 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

OFF = ["simulation.rollout=none", "imagination.enabled=false"]
COMPLETE_AT_MOST, MISSING_AT_MOST = 0.65, 0.85  # of the floor's MAE


def test_scores(arguments: argparse.Namespace, seed: int, *, imagines: bool) -> dict[str, float]:
    """MAE of both flows on the test split as shares of the floor's MAE; trains first unless that was done."""
    directory = arguments.output / f"{'on' if imagines else 'off'}-{seed}"
    if not (directory / "summary.json").is_file():
        overrides = [f"seed={seed}", *arguments.override, *([] if imagines else OFF)]
        command = [sys.executable, "-m", "dist_train.cli", "train", str(arguments.recipe), *overrides]
        start = time.perf_counter()
        subprocess.run([*command, "--output", str(directory), "--ranks", str(arguments.ranks)], check=True)
        print(f"{directory}: {time.perf_counter() - start:.0f} s", flush=True)
    scores = json.loads((directory / "summary.json").read_text())["test"]
    return {flow: scores[flow]["mae"] / scores["floor"]["mae"] for flow in ("complete", "missing")} | {
        "floor": scores["floor"]["mae"]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/quickstart.yaml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/imagination"), help="parent of the run directories")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("override", nargs="*", help="recipe overrides of all runs, e.g. data.path=data/other")
    arguments = parser.parse_intermixed_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    runs = {
        (seed, imagines): test_scores(arguments, seed, imagines=imagines)
        for seed in arguments.seeds
        for imagines in (True, False)
    }
    columns = [(imagines, flow) for imagines in (True, False) for flow in ("complete", "missing")]
    print("\n| seed | complete | missing | complete, off | missing, off | floor MAE |\n|---|---|---|---|---|---|")
    for seed in arguments.seeds:
        shares = " | ".join(f"{runs[seed, imagines][flow]:.3f}" for imagines, flow in columns)
        print(f"| {seed} | {shares} | {runs[seed, True]['floor']:.3f} |")
    shares_of = {
        (imagines, flow): [runs[seed, imagines][flow] for seed in arguments.seeds] for imagines, flow in columns
    }
    mean = {column: statistics.mean(shares) for column, shares in shares_of.items()}
    spread = {column: max(shares) - min(shares) for column, shares in shares_of.items()}
    for name, values in (("mean", mean), ("spread", spread)):
        print(f"| {name} | " + " | ".join(f"{values[column]:.3f}" for column in columns) + " | |")

    gain = mean[False, "missing"] - mean[True, "missing"]
    noise = max(spread[False, "missing"], spread[True, "missing"])
    verdicts = {
        f"complete {max(shares_of[True, 'complete']):.3f} <= {COMPLETE_AT_MOST} of the floor, every seed": (
            max(shares_of[True, "complete"]) <= COMPLETE_AT_MOST
        ),
        f"missing {max(shares_of[True, 'missing']):.3f} <= {MISSING_AT_MOST} of the floor, every seed": (
            max(shares_of[True, "missing"]) <= MISSING_AT_MOST
        ),
        f"imagination gains {gain:.3f} > spread {noise:.3f}": gain > noise,
    }
    print()
    for claim, holds in verdicts.items():
        print(f"{'yes' if holds else 'NO '} {claim}")
    sys.exit(0 if all(verdicts.values()) else 1)


if __name__ == "__main__":
    main()
