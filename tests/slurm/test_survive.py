"""A run on a real cluster is stopped in every way a cluster knows, and ends as if nothing had happened."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

import pytest
from submitit.slurm.slurm import SlurmExecutor

from slurm import executor
from tests.slurm.conftest import LabCluster, Undisturbed
from tests.slurm.runs import SubmittedRun, same

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def test_asked_to_stop(
    undisturbed: Undisturbed,
    idle_cluster: LabCluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A signal, a preemption and a requeue by hand. Submitit, if asked, would end the job at the first
    signal: in a job of less than ten minutes each counts as a time-out, and none is left.
    """
    monkeypatch.setattr(executor, "SlurmExecutor", partial(SlurmExecutor, max_num_timeout=-1))
    run = SubmittedRun(undisturbed.recipe, tmp_path / "run", time="9:00")
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
    assert same(run.result(), undisturbed.result)


def test_failures(undisturbed: Undisturbed, idle_cluster: LabCluster, tmp_path: Path) -> None:
    """A rank is killed, a node loses its power, the controller restarts."""
    run = SubmittedRun(undisturbed.recipe, tmp_path / "run")
    run.wait_step(6)
    run.signal_rank(1, signal.SIGKILL)
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
    assert same(run.result(), undisturbed.result)
