"""Kills a training run again and again, damages its checkpoints in between, and compares its end with that of an
undisturbed run.

    python -m tests.faults.rounds [--rounds 100] [--seed 0] [--output DIR] [--kinds forward power …]

Each round continues the run and kills it: a random rank at a random moment in a step, in a save, in a rename, in
evaluation, or all ranks at once from outside (a power cut, as far as the kernel's caches survive). In a third of the
rounds the newest checkpoint is then damaged. A run that came to its end is compared, and the next one begins. Final
weights, moments, the best checkpoint and the predictions of the test split must be the same to the last bit, and every
optimizer step must be in metrics.jsonl once with the same loss. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from rich.progress import track

from dist_train.cli import again
from dist_train.recipe import write_recipe
from dist_train.run_directory import RunDirectory
from sharding.errors import UserErrors
from sharding.launch import run_local
from sharding.portable import Portable
from sharding.retention import completed
from tests import tiny
from tests.faults import damage

RANKS = 2
KINDS = ("data", "forward", "backward", "optimizer", "saving", "write", "rename", "renamed", "evaluation", "power")
LIMIT = 300.0  # seconds in which a round must end


def recipe(folder: Path) -> Path:
    """A run of 32 steps that validates every fourth and saves every second one; dropout is on."""
    shards = tiny.write_corpus(folder / "shards")
    made = tiny.recipe(
        shards,
        training={"epochs": 8},
        checkpoint={"every_steps": 2, "keep_last": 3, "keep_every": 10},
        fusion={"dropout": 0.2},
        data={"workers": 1},
    )
    write_recipe(made, folder / "recipe.yaml")
    return folder / "recipe.yaml"


def command(kinds: Sequence[tuple[str, int]], recipe: Path, output: Path) -> list[str]:
    """A shell that gives each rank its trap, by its number."""
    words = ["train", str(recipe), "--output", str(output), "--resume"]
    cases = "".join(f"{rank}) set -- {kind} {number};; " for rank, (kind, number) in enumerate(kinds))
    script = f'case $RANK in {cases}esac; exec "$0" -m tests.faults.rank "$@" {shlex.join(words)} '
    script += f">>{shlex.quote(str(output))}/logs/output_$RANK.log 2>&1"
    return ["sh", "-c", script, sys.executable]


def finished(output: Path) -> bool:
    return (output / "summary.json").is_file()


def disturbed(recipe: Path, output: Path, kind: str, dice: random.Random) -> str:
    """Continues the run until it is killed or ends; returns what happened."""
    run = RunDirectory(output)
    if not output.exists():
        run.create()
        (output / "recipe.yaml").write_text(recipe.read_text())
    if kind == "power":
        return power_cut(recipe, output, dice)
    often = {"saving": 8, "write": 3000, "rename": 12, "renamed": 12, "evaluation": 8}.get(kind, 16)
    victim = 0 if kind.startswith("rename") else dice.randrange(RANKS)  # rank 0 renames
    traps = [("never", 0)] * RANKS
    traps[victim] = (kind, dice.randint(1, often))
    with suppress(UserErrors):
        run_local(command(traps, recipe, output), RANKS, run.logs)
    return "ended" if finished(output) else "killed"


def power_cut(recipe: Path, output: Path, dice: random.Random) -> str:
    """Kills the launcher and all ranks at once, at a random moment from the first heartbeat on."""
    words = ["train", str(recipe), "--output", str(output), "--ranks", str(RANKS), "--resume"]
    process = subprocess.Popen([*again()[:3], *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + LIMIT
    while not (output / "logs/heartbeat.json").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(dice.uniform(0, 6))
    family = [psutil.Process(process.pid)] if process.poll() is None else []
    with suppress(psutil.NoSuchProcess):
        family += [child for parent in family for child in parent.children(recursive=True)]
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    (output / "logs/heartbeat.json").unlink(missing_ok=True)
    return "ended" if finished(output) else "killed"


def ruin(output: Path, dice: random.Random) -> str | None:
    """Damages the newest checkpoint, if an older one is left to go on from. Returns how."""
    saved = completed(output / "checkpoints")
    if len(saved) < 3:
        return None
    how = dice.choice(damage.KINDS)
    how(next(iter(saved.values())), dice)
    return how.__name__


def outcome(output: Path) -> dict[str, Any]:
    """What a run ends with, bit by bit."""
    last, best = (Portable((output / "checkpoints" / name).resolve()) for name in ("last", "best"))
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {"steps": [[row["step"], row["loss"]] for row in rows if row["kind"] == "step"]}
    found["evaluations"] = [[row["step"], row["complete"]["mae"]] for row in rows if row["kind"] == "eval"]
    found["best"] = best.state["progress"]["best_step"]
    found["predictions"] = (output / "predictions_test.csv").read_text()
    for name, checkpoint in (("last", last), ("best", best)):
        for kind in ("model", "optimizer"):
            for key, value in checkpoint.tensors(kind):
                found[f"{name} {kind} {key}"] = value.numpy().tobytes()
    return found


def rounds(folder: Path, count: int, seed: int, kinds: Sequence[str]) -> bool:
    """Runs the rounds; prints and returns whether all ends were the undisturbed one."""
    dice = random.Random(seed)
    made = recipe(folder)
    whole = folder / "whole"
    while not finished(whole):
        disturbed(made, whole, "never", dice)
    expected = outcome(whole)
    tally: Counter[str] = Counter()
    run, good = 0, True
    for number in track(range(count), f"{count} rounds"):
        output = folder / f"run{run}"
        kind = kinds[number % len(kinds)]
        result = disturbed(made, output, kind, dice)
        tally[f"{kind}: {result}"] += 1
        if result == "killed" and dice.random() < 1 / 3:
            tally[f"damaged: {ruin(output, dice)}"] += 1
        if result == "ended" or number == count - 1:
            while not finished(output):
                if disturbed(made, output, "never", dice) == "killed":
                    print(f"round {number}: run{run} does not continue; see {output}/logs")
                    return False
            found = outcome(output)
            different = sorted(key for key in expected.keys() | found.keys() if found.get(key) != expected.get(key))
            good = good and not different
            print(f"run{run}, ended in round {number}: {'the same' if not different else different[:5]}", flush=True)
            run += 1
    for what, times in sorted(tally.items()):
        print(f"{times:5d}  {what}")
    return good


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = arguments.output or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        sys.exit(0 if rounds(folder, arguments.rounds, arguments.seed, arguments.kinds) else 1)


if __name__ == "__main__":
    main()
