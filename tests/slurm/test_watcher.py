"""What Submitit believes of its jobs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from submitit.slurm.slurm import SlurmJob

from slurm.executor import plain_executor
from slurm.settings import LaunchSettings
from slurm.watcher import QueueWatcher
from tests.slurm.conftest import LabCluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(200)]


def test_node_failure_is_not_the_end(idle_cluster: LabCluster, tmp_path: Path) -> None:
    """A job whose node is lost runs again, and its result is that of the second time; a job that ends is noticed soon,
    and so is one that was cancelled.
    """
    assert isinstance(SlurmJob.watcher, QueueWatcher)
    settings = LaunchSettings.model_validate({"gpus_per_node": 0, "cpus_per_rank": 1, "time": "10:00"})
    executor = plain_executor(settings, tmp_path / "jobs", "watched")
    folder = str(tmp_path)

    def work() -> str:  # is pickled whole: the node knows no tests
        import os  # noqa: PLC0415
        import time  # noqa: PLC0415
        from pathlib import Path  # noqa: PLC0415

        again = os.environ.get("SLURM_RESTART_COUNT", "0")
        (Path(folder) / f"began_{again}").write_text(os.environ["SLURMD_NODENAME"])
        time.sleep(0 if again == "1" else 100)
        return again

    job = executor.submit(work)
    began = tmp_path / "began_0"
    while not (began.exists() and began.read_text()):
        time.sleep(0.1)
    node = began.read_text()
    idle_cluster.crash(node)
    idle_cluster.slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=crashed")  # 30 s sooner
    while "began_1" not in {path.name for path in tmp_path.iterdir()}:  # sacct says NODE_FAIL meanwhile
        assert not job.done(force_check=True)
        time.sleep(0.05)
    assert job.results() == ["1"]
    assert (tmp_path / "began_1").read_text() != node

    waiting = executor.submit(work)
    waiting.cancel()
    asked = time.monotonic()
    while not waiting.done():
        assert time.monotonic() - asked < 20
        time.sleep(0.2)
    assert waiting.get_info("cache")["State"] == "CANCELLED"
