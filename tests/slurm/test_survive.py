"""A run on a real cluster is stopped in every way a cluster knows, and ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

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


def test_asked_to_stop(recipe: Path, reference: dict[str, Any], idle_cluster: LabCluster, tmp_path: Path) -> None:
    """A signal, a preemption and a requeue by hand, one after another."""
    run = SubmittedRun(recipe, tmp_path / "run")
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
    kill_rank(idle_cluster, 1)
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


def kill_rank(cluster: LabCluster, rank: int) -> None:
    """SIGKILL to a rank, whatever node it is on: found by its environment."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        ours = f"SLURM_CONF={os.environ['SLURM_CONF']}".encode() in variables
        if ours and f"SLURM_PROCID={rank}".encode() in variables and b"submitit.core._submit" in command:
            os.kill(int(process.name), signal.SIGKILL)
            return
    raise AssertionError("no such rank")
