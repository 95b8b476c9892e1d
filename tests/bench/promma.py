"""What ProMMA's evaluator saves: time and error at several thresholds of one trained model, by seed, in one process.

    dist-train shards demo data/demo
    python tests/bench/promma.py [--seeds 0 1 2] [--output runs/promma_bench] [KEY=VALUE …]

Each run is `dist-train train recipes/quickstart.yaml imagination=promma simulation.rollout=cached …` on two ranks; the
language model learns to transcribe (`loss.asr`) and really decodes for each clip whose text is imagined. A finished run
in --output is not repeated. Then the test split is evaluated at each threshold, and with nothing imagined, in turn,
--rounds times; seconds are medians, and ratios to threshold 0, which imagines always, are of the same process.

`by chance`: MAE if as many clips were imagined, drawn at random (its expectation, exact: a clip's prediction does not
depend on the others). A judge is worth its name only below that. `equal`: no worse than threshold 0 by more than
the spread (max - min) of that MAE over seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dist_train.build import open_split
from dist_train.costs import clip_costs
from dist_train.evaluate import Predictions, find_checkpoint, load_trained, predict
from dist_train.phases import Phases, measured
from dist_train.recipe import load_recipe
from dist_train.run_directory import RunDirectory
from sharding import world

PROMMA = (
    *("imagination=promma", "simulation.rollout=cached", "simulation.max_new_tokens=16", "simulation.prompt=Say it"),
    "loss.asr=0.2",
)
NEVER = 1.1  # no probability reaches it


class Outcome(NamedTuple):
    """One threshold of one seed: share of the clips that want text whose text is imagined, MAE of both flows, MAE if as
    many were drawn by chance, seconds of the evaluation and of decoding in it.
    """

    share: float
    complete: float
    missing: float
    chance: float
    seconds: float
    decoding: float


def train(run: Path, seed: int, overrides: list[str]) -> None:
    """Trains a seed unless that was done."""
    if (run / "summary.json").is_file():
        return
    command = [sys.executable, "-m", "dist_train.cli", "train", "recipes/quickstart.yaml", *PROMMA, f"seed={seed}"]
    start = time.perf_counter()
    subprocess.run([*command, *overrides, "--output", str(run), "--ranks", "2"], check=True, stdout=subprocess.DEVNULL)
    print(f"{run}: trained in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def evaluate(run: RunDirectory, thresholds: list[float], rounds: int) -> list[Outcome]:
    """The best checkpoint at each threshold, the first of which is 0 and the last `NEVER`."""
    recipe = load_recipe(run.recipe)
    loaded, collate = load_trained(run, recipe, find_checkpoint(run, "best"))
    model: Any = loaded
    split = open_split(recipe, "test")
    costs = clip_costs(recipe, split)
    seconds: dict[float, list[float]] = {one: [] for one in thresholds}
    decoding: dict[float, list[float]] = {one: [] for one in thresholds}
    found: dict[float, Predictions] = {}
    for turn in range(rounds + 1):  # the first one warms up
        for threshold in thresholds:
            model.threshold = threshold
            phases, start = Phases(), time.perf_counter()
            with measured(phases):
                found[threshold] = predict(
                    model, split, collate, batch=recipe.data.evaluation_batch, workers=0, costs=costs
                )
            if turn:
                seconds[threshold].append(time.perf_counter() - start)
                decoding[threshold].append(phases.read().get("rollout", 0.0))
    always, never = (np.abs(found[one].missing - found[one].label) for one in (thresholds[0], thresholds[-1]))
    outcomes = []
    for threshold in thresholds:
        said = found[threshold]
        assert said.imagined is not None
        wanted, imagined = said.imagined.T.astype(bool)
        share = imagined.sum() / wanted.sum()
        outcomes.append(
            Outcome(
                share,
                float(np.abs(said.complete - said.label).mean()),
                float(np.abs(said.missing - said.label).mean()),
                float(np.where(wanted, share * always + (1 - share) * never, always).mean()),
                statistics.median(seconds[threshold]),
                statistics.median(decoding[threshold]),
            )
        )
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.25, 0.5, 0.75, 0.9], help="beside 0")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/promma_bench"))
    parser.add_argument("override", nargs="*", help="recipe overrides of all runs, e.g. data.path=data/other")
    arguments = parser.parse_intermixed_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    thresholds = [0.0, *sorted(set(arguments.thresholds) - {0.0}), NEVER]
    runs = [arguments.output / f"seed={seed}" for seed in arguments.seeds]
    for run, seed in zip(runs, arguments.seeds, strict=True):
        train(run, seed, arguments.override)
    world.join(world.World(0, 1, 0, "127.0.0.1", 29531), with_deepspeed=False)
    by_seed = np.array([evaluate(RunDirectory(run), thresholds, arguments.rounds) for run in runs])
    world.leave()
    floors = [json.loads((run / "summary.json").read_text())["test"]["floor"]["mae"] for run in runs]

    mean = by_seed.mean(0)
    spread = float(np.ptp(by_seed[:, 0, 2]))
    base = mean[0]
    print("| threshold | imagined | evaluation | decoding | MAE complete | MAE missing | by seed | by chance | equal |")
    print("|---|---|---|---|---|---|---|---|---|")
    equal = [row[2] <= base[2] + spread for row in mean]
    for place, (threshold, same) in enumerate(zip(thresholds, equal, strict=True)):
        row = Outcome(*mean[place])
        seeds = " ".join(f"{value:.3f}" for value in by_seed[:, place, 2])
        ratios = f"{row.seconds / base[4]:.2f} × | {row.decoding / base[5]:.2f} ×"
        maes = f"{row.complete:.3f} | {row.missing:.3f} | {seeds} | {row.chance:.3f}"
        name = "never" if threshold == NEVER else f"{threshold:g}"
        print(f"| {name} | {row.share:.0%} | {ratios} | {maes} | {'yes' if same else 'no'} |")
    print(
        f"\nThreshold 0: {base[4]:.2f} s of which decoding {base[5]:.2f} s. Spread of its MAE over "
        f"{len(runs)} seeds {spread:.3f}. Floor {statistics.mean(floors):.3f}."
    )
    judged = [place for place in range(1, len(thresholds) - 1) if equal[place]]
    if judged:
        best = min(judged, key=lambda place: mean[place][4])
        row = Outcome(*mean[best])
        saved = f"{1 - row.seconds / base[4]:.0%} of the evaluation, {1 - row.decoding / base[5]:.0%} of decoding"
        print(
            f"Saved at equal MAE: {saved} (threshold {thresholds[best]:g}, {row.share:.0%} imagined); MAE is "
            f"{row.missing - row.chance:+.3f} off what as many clips drawn by chance give."
        )
    else:
        print("Saved at equal MAE: nothing.")
    if equal[-1]:
        print("Imagining nothing at all is equal, too: the saving is not the evaluator's, the text is worth nothing.")


if __name__ == "__main__":
    main()
