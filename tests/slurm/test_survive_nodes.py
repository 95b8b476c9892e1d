"""A run on a real cluster loses nodes or time, and goes on exactly, on another number of nodes too."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.slurm.conftest import LabCluster, Undisturbed
from tests.slurm.runs import SubmittedRun, same

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def test_another_number_of_nodes(undisturbed: Undisturbed, idle_cluster: LabCluster, tmp_path: Path) -> None:
    """A rank stands still; when the run comes back there is only one node. The samples go on exactly."""
    run = SubmittedRun(undisturbed.recipe, tmp_path / "run", "training.watchdog_seconds=10", nodes="1-2")
    assert run.wait_attempt(0).ranks == 2
    run.wait_step(6)
    run.signal_rank(1, signal.SIGSTOP)
    run.wait("the verdict", lambda: run.attempts[0].decision)
    idle_cluster.slurm("scontrol", "update", "nodename=node2", "state=drain", "reason=bad")
    first = run.attempts[0]
    assert (first.outcome, first.decision, first.failures[0].rank) == ("hung", "requeue", 1)
    assert run.wait_attempt(1).ranks == 1
    found = run.result()
    assert [step for step, _ in found["steps"]] == [step for step, _ in undisturbed.result["steps"]]
    assert goes_on(losses(found), undisturbed.result)


@pytest.mark.parametrize("lost", [False, True], ids=["signal", "signal lost"])
def test_time_limit(undisturbed: Undisturbed, idle_cluster: LabCluster, tmp_path: Path, lost: bool) -> None:
    """A minute is too short: the run saves before it is over, is requeued and goes on."""
    # A layer that swallows the signal: Slurm sends one that nobody hears.
    settings = {"sbatch": {"signal": "CONT@1"}} if lost else {}
    minute = {"time": "1:00", "signal_seconds": 30, "nodes": "1"}
    run = SubmittedRun(undisturbed.recipe, tmp_path / "run", "training.epochs=1000", **minute, **settings)
    run.wait_attempt(1)
    run.wait_step(3, attempt=1)
    first, second = run.attempts[:2]
    assert (first.outcome, first.decision) == ("stopped", "requeue")
    assert second.first_step == first.last_step != 0
    idle_cluster.slurm("scancel", run.job)
    rows = [[row["step"], row["loss"]] for row in run.rows("step")][: len(undisturbed.result["steps"])]
    assert [step for step, _ in rows] == list(range(1, len(rows) + 1)), "each step is made once"
    assert goes_on([loss for _, loss in rows], undisturbed.result)


def goes_on(found: list[float], reference: dict[str, Any]) -> bool:
    """Whether losses on another number of ranks are the reference's, for as many steps as there are. Rounding differs,
    and grows over a hundred steps to some percent.
    """
    expected = losses(reference)[: len(found)]
    return np.allclose(found[:25], expected[:25], rtol=1e-4) and np.allclose(found, expected, rtol=0.1)


def losses(result: dict[str, Any]) -> list[float]:
    """Loss of each step."""
    return [loss for _, loss in result["steps"]]


def test_network_cut(undisturbed: Undisturbed, idle_cluster: LabCluster, tmp_path: Path) -> None:
    """A node vanishes from the network and comes back."""
    run = SubmittedRun(undisturbed.recipe, tmp_path / "run")
    run.wait_step(6)
    idle_cluster.cut("node2")
    run.wait("the loss to be noticed", lambda: idle_cluster.states()["node2"].startswith("down"))
    idle_cluster.heal("node2")
    run.wait_attempt(1)
    assert same(run.result(), undisturbed.result)
