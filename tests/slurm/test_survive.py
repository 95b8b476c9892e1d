"""A run on a real cluster is stopped in every way a cluster knows, and ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from submitit.slurm.slurm import SlurmExecutor

from slurm import executor
from tests.slurm.conftest import LabCluster
from tests.slurm.runs import SubmittedRun, same, write_tiny

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("survive"))


@pytest.fixture(scope="module")
def reference(recipe: Path, cluster: LabCluster) -> dict[str, Any]:
    """What the run ends with if nobody disturbs it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.settings.environment.items():
            patch.setenv(name, value)
        run = SubmittedRun(recipe, recipe.parent / "undisturbed")
        found = run.result()
    assert [(attempt.nodes, attempt.ranks) for attempt in run.attempts] == [(["node1", "node2"], 2)]
    return found


def test_asked_to_stop(
    recipe: Path,
    reference: dict[str, Any],
    idle_cluster: LabCluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A signal, a preemption and a requeue by hand. Submitit, if asked, would end the job at the first
    signal: in a job of less than ten minutes each counts as a time-out, and none is left.
    """
    monkeypatch.setattr(executor, "SlurmExecutor", partial(SlurmExecutor, max_num_timeout=-1))
    run = SubmittedRun(recipe, tmp_path / "run", time="9:00")
    run.wait_step(6)
    idle_cluster.slurm("scancel", "--signal=USR2", run.job)
    run.wait_attempt(1)
    first = run.attempts[0]
    assert (first.outcome, first.decision) == ("stopped", "requeue") and first.last_step == run.attempts[1].first_step

    run.wait_step(6, attempt=1)
    idle_cluster.slurm("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--wrap=true", "--output=/dev/null")
    run.wait_attempt(2)
    second = run.attempts[1]
    assert (second.outcome, second.decision) == ("stopped", "requeue") and second.last_step == run.attempts[
        2
    ].first_step

    run.wait_step(6, attempt=2)
    idle_cluster.slurm("scontrol", "requeue", run.job)
    run.wait_attempt(3)
    assert same(run.result(), reference)


def test_failures(recipe: Path, reference: dict[str, Any], idle_cluster: LabCluster, tmp_path: Path) -> None:
    """A rank is killed, a node loses its power, the controller restarts."""
    run = SubmittedRun(recipe, tmp_path / "run")
    run.wait_step(6)
    signal_rank(1, signal.SIGKILL)
    run.wait_attempt(1)
    first = run.attempts[0]
    assert (first.outcome, first.decision) == ("failed", "requeue")
    assert (first.failures[0].rank, first.failures[0].node, first.failures[0].error) == (1, "node2", "Killed")

    run.wait_step(6, attempt=1)
    idle_cluster.crash("node2")
    idle_cluster.slurm(
        "scontrol", "update", "nodename=node2", "state=down", "reason=crashed"
    )  # 30 s sooner than itself
    idle_cluster.revive("node2")
    run.wait_attempt(2)

    run.wait_step(3, attempt=2)
    idle_cluster.restart_controller(kill=True)
    assert same(run.result(), reference)


def test_another_number_of_nodes(
    recipe: Path, reference: dict[str, Any], idle_cluster: LabCluster, tmp_path: Path
) -> None:
    """A rank stands still; when the run comes back there is only one node. The samples go on exactly."""
    run = SubmittedRun(recipe, tmp_path / "run", "training.watchdog_seconds=10", nodes="1-2")
    assert run.wait_attempt(0).ranks == 2
    run.wait_step(6)
    signal_rank(1, signal.SIGSTOP)
    run.wait("the verdict", lambda: run.attempts[0].decision)
    idle_cluster.slurm("scontrol", "update", "nodename=node2", "state=drain", "reason=bad")
    first = run.attempts[0]
    assert (first.outcome, first.decision, first.failures[0].rank) == ("hung", "requeue", 1)
    assert run.wait_attempt(1).ranks == 1
    found = run.result()
    assert [step for step, _ in found["steps"]] == [step for step, _ in reference["steps"]]
    assert goes_on(losses(found), reference)


@pytest.mark.parametrize("lost", [False, True], ids=["signal", "signal lost"])
def test_time_limit(
    recipe: Path, reference: dict[str, Any], idle_cluster: LabCluster, tmp_path: Path, lost: bool
) -> None:
    """A minute is too short: the run saves before it is over, is requeued and goes on."""
    # A layer that swallows the signal: Slurm sends one that nobody hears.
    settings = {"sbatch": {"signal": "CONT@1"}} if lost else {}
    run = SubmittedRun(
        recipe, tmp_path / "run", "training.epochs=1000", time="1:00", signal_seconds=30, nodes="1", **settings
    )
    run.wait_attempt(1)
    run.wait_step(3, attempt=1)
    first, second = run.attempts[:2]
    assert (first.outcome, first.decision) == ("stopped", "requeue")
    assert second.first_step == first.last_step != 0
    idle_cluster.slurm("scancel", run.job)
    rows = [[row["step"], row["loss"]] for row in run.rows("step")][:120]
    assert [step for step, _ in rows] == list(range(1, len(rows) + 1)), "each step is made once"
    assert goes_on([loss for _, loss in rows], reference)


def goes_on(found: list[float], reference: dict[str, Any]) -> bool:
    """Whether losses on another number of ranks are the reference's, for as many steps as there are. Rounding differs,
    and grows over a hundred steps to some percent.
    """
    expected = losses(reference)[: len(found)]
    return np.allclose(found[:25], expected[:25], rtol=1e-4) and np.allclose(found, expected, rtol=0.1)


def losses(result: dict[str, Any]) -> list[float]:
    """Loss of each step."""
    return [loss for _, loss in result["steps"]]


def test_network_cut(recipe: Path, reference: dict[str, Any], idle_cluster: LabCluster, tmp_path: Path) -> None:
    """A node vanishes from the network and comes back."""
    run = SubmittedRun(recipe, tmp_path / "run")
    run.wait_step(6)
    idle_cluster.cut("node2")
    run.wait("the loss to be noticed", lambda: idle_cluster.states()["node2"].startswith("down"))
    idle_cluster.heal("node2")
    run.wait_attempt(1)
    assert same(run.result(), reference)


def signal_rank(rank: int, number: signal.Signals) -> None:
    """A signal to a rank, whatever node it is on: found by its environment."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        ours = f"SLURM_CONF={os.environ['SLURM_CONF']}".encode() in variables
        if ours and f"SLURM_PROCID={rank}".encode() in variables and b"submitit.core._submit" in command:
            os.kill(int(process.name), number)
            return
    raise AssertionError("no such rank")
