"""Runs that are given up, with the reason, instead of burning hours."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.conftest import LabCluster
from tests.slurm.runs import SubmittedRun, write_tiny

PATIENCE = """
class Impatience:
    def beat(self, phase, step, waits):
        from slurm.preflight import examine
        examine.ARRIVAL = 20.0

heartbeat.listeners.insert(0, Impatience())
"""
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("limits"))


def test_same_failure(recipe: Path, idle_cluster: LabCluster, tmp_path: Path) -> None:
    """A rank that fails at the same step in the same way each time stops the run, which tells why."""
    action = 'raise RuntimeError(f"device-side assert in {hex(id(self))}")'
    write_fault(tmp_path, "step == 7", action)
    run = SubmittedRun(recipe, tmp_path / "run", environment={"PYTHONPATH": str(tmp_path)}, same_failures=2)
    last = run.wait_end()
    assert last.decision == "stop" and len(run.attempts) == 2, run.printed()
    assert "2 attempts ended at step 7 in the same way" in last.reason and "device-side assert" in last.reason
    assert (last.failures[0].rank, last.failures[0].node) == (1, "node2")
    run.wait("the end of the job", lambda: "FAILED" in idle_cluster.slurm("sacct", "-nXj", run.job, "-o", "State"))


def test_bad_node(recipe: Path, idle_cluster: LabCluster, tmp_path: Path) -> None:
    """A node that stops answering in preflight is named; the run starts without it."""
    write_fault(tmp_path, 'phase == "preflight"', "os.kill(os.getpid(), signal.SIGSTOP)")
    with (tmp_path / "sitecustomize.py").open("a") as file:  # nobody waits two minutes for it to arrive
        file.write(PATIENCE)
    run = SubmittedRun(
        recipe,
        tmp_path / "run",
        "training.epochs=1",
        nodes="1-2",
        preflight=True,
        environment={"PYTHONPATH": str(tmp_path)},
    )
    last = run.wait_end()
    first = run.attempts[0]
    assert (first.outcome, first.decision, first.excluded) == ("bad nodes", "requeue", ["node2"]), run.printed()
    assert (last.decision, last.nodes) == ("done", ["node1"]), run.printed()


def write_fault(folder: Path, condition: str, action: str) -> None:
    """Python in a job with this folder in PYTHONPATH does it in rank 1, where a phase of the training begins."""
    (folder / "sitecustomize.py").write_text(
        f"""
import os
import signal
from sharding import heartbeat

class Fault:
    def beat(self, phase, step, waits):
        if {condition} and os.environ.get("SLURM_PROCID") == "1":
            {action}

heartbeat.listeners.append(Fault())
"""
    )


def test_users_mistake(recipe: Path, idle_cluster: LabCluster, tmp_path: Path) -> None:
    """What would go wrong again is not tried again."""
    run = SubmittedRun(recipe, tmp_path / "run", "optimizer.learning_rate=1e30", nodes="1")
    last = run.wait_end()
    assert (last.outcome, last.decision, last.restart) == ("refused", "stop", 0), run.printed()
    assert "would fail again" in last.reason and "not finite" in last.reason
