"""Runs that stand still: the rank is named, all ranks write their stacks, and the job ends with a code of its own."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from dist_train.recipe import write_recipe
from sharding.launch import HUNG
from tests import tiny
from tests.end_to_end.commands import errors, started, wait_until

SECONDS = 6.0


def places(output: Path) -> list[dict[str, Any]]:
    """Where every rank is, as rank 0 writes it."""
    try:
        return json.loads((output / "logs/heartbeat.json").read_text())
    except OSError:
        return []


def process_of(output: Path, rank: int) -> psutil.Process:
    return psutil.Process(int(places(output)[rank]["process"].split(":")[1]))


def hang(recipe: Path, output: Path, cause: Callable[[], None]) -> tuple[str, float]:
    """Trains, causes the hang after the third step, and returns the only error line and the seconds it took."""
    changes = ["training.epochs=900", f"training.watchdog_seconds={SECONDS}", "data.workers=1"]
    with started("train", recipe, *changes, "--output", output, "--ranks", "2") as process:
        wait_until(lambda: any(place["step"] > 3 for place in places(output)), process)
        cause()
        began = time.monotonic()
        printed = process.communicate(timeout=90)[1]
    # Python's own thread that hands tensors over may complain when a worker is killed in the middle of that: no other.
    assert process.returncode == HUNG and printed.count("Traceback") == printed.count(", in _serve"), printed
    (line,) = errors(printed)
    return line, time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank(rank: int, recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    line, seconds = hang(recipe, output, lambda: process_of(output, rank).suspend())
    assert line.startswith(f"rank {rank}: has not been heard of for") and "--resume" in line
    assert rank == 0 or "in phase" in line
    assert SECONDS < seconds < 2 * SECONDS + 25
    assert "distributed_c10d.py" in (output / f"logs/rank_{1 - rank}.stacks.txt").read_text()


@pytest.mark.slow
def test_a_stuck_data_worker(tmp_path: Path) -> None:
    """Its rank does not wait for others, which tells it from those that wait for it. The epoch is long, since torch
    waits only five seconds for a worker that has read all of its epoch and does not end, and goes on with a new one.
    """
    output, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    write_recipe(tiny.recipe(tiny.write_corpus(tmp_path / "shards", train=300)), recipe)

    def cause() -> None:
        (worker,) = process_of(output, 1).children()
        worker.suspend()

    line, _ = hang(recipe, output, cause)
    assert line.startswith("rank 1: stands still for") and "in phase data after step" in line, line
    assert "the other ranks wait for it" in line
    assert "in next_batch" in (output / "logs/rank_1.stacks.txt").read_text()


@pytest.mark.slow
def test_a_file_that_never_answers(corpus: Path, recipe: Path, tmp_path: Path) -> None:
    """A shard becomes a FIFO that nobody writes: opening it blocks a worker, whose stack is written, too."""
    output = tmp_path / "run"

    def cause() -> None:
        for tar in (corpus_copy / "train-000000.tar", corpus_copy / "train-000001.tar"):
            tar.unlink()
            os.mkfifo(tar)

    corpus_copy = tmp_path / "shards"
    corpus_copy.mkdir()
    for file in corpus.iterdir():
        (corpus_copy / file.name).write_bytes(file.read_bytes())
    copied = tmp_path / "recipe.yaml"
    copied.write_text(recipe.read_text().replace(str(corpus), str(corpus_copy)))
    line, _ = hang(copied, output, cause)
    assert "in phase data" in line or "in phase evaluation: data" in line
    stacks = "".join(path.read_text() for path in (output / "logs").glob("*.stacks.txt"))
    assert "in descriptor" in stacks


@pytest.mark.slow
def test_a_rank_that_died(recipe: Path, tmp_path: Path) -> None:
    """The launcher sees that without waiting for the watchdog."""
    output = tmp_path / "run"
    with started("train", recipe, "training.epochs=900", "--output", output, "--ranks", "2") as process:
        wait_until(lambda: any(place["step"] > 3 for place in places(output)), process)
        process_of(output, 1).send_signal(signal.SIGKILL)
        printed = process.communicate(timeout=60)[1]
    assert process.returncode not in (0, None) and any("rank 1: was killed" in line for line in errors(printed)), (
        printed
    )
