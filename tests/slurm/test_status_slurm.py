"""status, logs and cancel with a real Slurm: its reasons, requeues, arrays, chains, and when it does not answer."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from slurm.queue import JobState, job_state, job_states
from slurm.record import ChainLink, LaunchRecord
from slurm.settings import LaunchSettings
from slurm.status import Files, RunStatus, gather
from tests.end_to_end.commands import call
from tests.slurm.cluster import Cluster
from tests.slurm.cluster_settings import CHECKOUT
from tests.slurm.laid import Laid
from tests.slurm.terminal import on_terminal

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

# What a rank does, as far as its files show: an attempt, heartbeats, and, asked to stop, a save. It needs no torch.
PRETEND = f"""
import json, os, platform, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(CHECKOUT)!r})
from slurm.record import Attempt, LaunchRecord
run = Path(sys.argv[1])
record, restart = LaunchRecord(run), int(os.environ.get("SLURM_RESTART_COUNT", 0))
job, nodes = os.environ["SLURM_JOB_ID"], [platform.node()]
attempt = Attempt(job=job, restart=restart, started=time.time(), nodes=nodes, ranks=1, first_step=0)
def stop(number, frame):
    global phase
    phase = "saving"
signal.signal(signal.SIGUSR2, stop)
phase, saving = "forward", 0
record.add_attempt(attempt)
print("attempt", restart, "runs", flush=True)
while saving < 20:
    place = dict(count=0, phase=phase, step=5, waits=False, module=None, idle=0, turn=1)
    place["process"] = f"{{platform.node()}}:{{os.getpid()}}"
    new = run / "logs/heartbeat.json.new"
    new.write_text(json.dumps([place]))
    new.replace(run / "logs/heartbeat.json")
    saving += phase == "saving"
    time.sleep(0.1)
reason = "cancelled" if record.cancelled.exists() else "nobody has cancelled it"
told = dict(ended=time.time(), outcome="stopped", last_step=5, decision="stop", reason=reason)
record.add_attempt(attempt.model_copy(update=told))
sys.exit(1)
"""


class Jobs:
    """Runs on the cluster whose jobs are plain ones."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        (folder / "pretend.py").write_text(PRETEND)

    def sbatch(self, command: str, *options: str) -> str:
        """Queues a job of one CPU; its id."""
        small = ["--parsable", "--output=/dev/null", "--mem=50", "--time=10", "--open-mode=append", "--requeue"]
        return self.cluster.slurm("sbatch", *small, *options, f"--wrap={command}").strip()

    def run(self, name: str, job: str, **submission: Any) -> Laid:
        """A run directory of a job."""
        laid = Laid(self.folder / name)
        laid.submitted(job, ago=0, **submission)
        return laid

    def training(self, name: str, *options: str, **submission: Any) -> Laid:
        """A run whose job pretends to train, with its log where Submitit has it."""
        place = self.folder / name
        logs = place / "slurm/jobs/1/%j_0_log"
        logs.parent.mkdir(parents=True)
        command = f"exec srun {sys.executable} {self.folder}/pretend.py {place}"
        job = self.sbatch(command, f"--output={logs}.out", f"--error={logs}.err", *options)
        return self.run(name, job, **submission)

    def job(self, laid: Laid) -> str:
        """Its id."""
        return LaunchRecord(laid.path).read_submissions()[-1].job


@pytest.fixture
def jobs(idle_cluster: Cluster, tmp_path: Path) -> Jobs:
    return Jobs(idle_cluster, tmp_path)


def look(laid: Laid) -> RunStatus:
    return gather([Files(laid.path)])[0]


def wait(laid: Laid, condition: Callable[[RunStatus], bool], seconds: float = 90) -> RunStatus:
    """Waits until the status of a run is so."""
    deadline = time.monotonic() + seconds
    while not condition(found := look(laid)):
        assert time.monotonic() < deadline, found.model_dump_json(indent=1)
        time.sleep(0.2)
    return found


def test_why_jobs_wait_and_how_they_ended(jobs: Jobs) -> None:
    """One question to Slurm about all of them, an array's element and a forgotten job among them."""
    full = jobs.sbatch("sleep 300", "--nodes=2", "--exclusive")
    made = {
        "full": full,
        "waits": jobs.sbatch("sleep 300"),
        "held": jobs.sbatch("true", "--hold"),
        "later": jobs.sbatch("true", "--begin=now+1hour"),
        "after": jobs.sbatch("true", f"--dependency=afterok:{full}"),
        "large": jobs.sbatch("true", "--nodes=3"),
        "element": jobs.sbatch("sleep 300", "--array=0-1%1") + "_1",
        "gone": jobs.sbatch("true", "--hold"),
        "forgotten": "999999999",
        "never": "1" * 19,
    }
    jobs.cluster.slurm("scancel", made["gone"])
    runs = {name: jobs.run(name, job) for name, job in made.items()}
    wait(runs["full"], lambda found: found.state == "starting")
    wait(runs["waits"], lambda found: bool(found.why))
    wait(runs["later"], lambda found: "begin time" in found.why)  # Slurm says Resources until it has looked again
    found = dict(zip(runs, gather([Files(run.path) for run in runs.values()]), strict=True))
    assert {name: one.state for name, one in found.items()} == {
        "full": "starting", "waits": "pending", "held": "pending", "later": "pending", "after": "pending",
        "large": "pending", "element": "pending", "gone": "cancelled", "forgotten": "failed", "never": "failed",
    }  # fmt: skip
    for name, words in {
        "waits": "free|other jobs are before it", "held": "scontrol release", "later": "begin time",
        "after": "another job", "large": "more nodes than its partition", "gone": "before it began",
        "forgotten": "forgotten",
    }.items():  # fmt: skip
        assert re.search(words, found[name].why), found[name].why
    told = jobs.cluster.slurm("scontrol", "show", "job", full)
    end = re.search(r"EndTime=(\S+)", told)
    assert end and found["full"].limit == datetime.fromisoformat(end[1]).timestamp()
    assert found["full"].slurm and found["full"].slurm.nodes == "node[1-2]"
    later = found["later"].slurm
    assert later and datetime.fromisoformat(later.start).timestamp() == pytest.approx(time.time() + 3600, abs=90)
    assert job_state(made["element"]).state == "PENDING" and not job_states([])


def test_a_job_that_failed_with_and_without_accounting(
    jobs: Jobs, cluster_without_accounting: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cluster in (jobs.cluster, cluster_without_accounting):
        for name, value in cluster.settings.environment.items():
            monkeypatch.setenv(name, value)
        run = Jobs(cluster, jobs.folder).run(cluster.settings.accounting, "")
        job = Jobs(cluster, jobs.folder).sbatch("exit 3")
        run.submitted(job, ago=0)
        found = wait(run, lambda one: one.state == "failed" and "it failed" in one.why)
        assert found.why.startswith("it ended before the training began; it failed"), found.why
        if cluster is jobs.cluster:  # the accounting is some seconds behind
            wait(run, lambda one: "exit code 3" in one.why)


def test_a_requeue_is_shown_and_its_log_followed(jobs: Jobs) -> None:
    run = jobs.training("run")
    with on_terminal("logs", run.path, "--follow") as terminal:
        terminal.until("attempt 0 runs")
        found = wait(run, lambda one: one.state == "running")
        assert [one.outcome for one in found.attempts] == [None] and found.progress.phase == "forward"
        assert found.saves and found.limit == found.saves + 30
        jobs.cluster.slurm("scontrol", "requeue", jobs.job(run))
        found = wait(run, lambda one: one.state == "requeued")
        assert "told no end" in found.why and [one.outcome for one in found.attempts] == ["lost"]
        found = wait(run, lambda one: one.state == "running")
        assert [(one.restart, one.outcome) for one in found.attempts] == [(0, "lost"), (1, None)]
        terminal.until("attempt 1 runs")
        jobs.cluster.slurm("scancel", jobs.job(run))
        found = wait(run, lambda one: one.over)
        assert found.state == "cancelled"
        code, text = terminal.end()
    assert code == 0 and "-- cancelled" in text and "attempt" not in text


def test_cancel_lets_it_save_and_what_follows_never_starts(jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    run = jobs.training("run")
    after = jobs.sbatch("true", f"--dependency=afternotok:{jobs.job(run)}")
    run.submitted(jobs.job(run), ago=0, chain=[ChainLink(command="dist-train convert", job=after)])
    assert wait(run, lambda one: one.state == "running").chain[0].state == "PENDING"
    process = subprocess.Popen([sys.executable, "-m", "dist_train.cli", "cancel", run.path], stderr=subprocess.PIPE)
    wait(run, lambda one: one.state == "saving")
    assert b"to save and end" in process.communicate(timeout=60)[1] and process.returncode == 0
    found = look(run)
    assert (found.state, found.attempts[-1].outcome, found.attempts[-1].reason) == ("cancelled", "stopped", "cancelled")
    assert "saved at step 5" in found.why and found.chain[0].state == "CANCELLED"
    assert jobs.cluster.jobs() == []
    assert call("cancel", run.path) == 0 and "nothing to cancel" in capsys.readouterr().err


def test_cancel_of_what_waits_and_cancel_now(jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    held = jobs.training("held", "--hold")
    assert call("cancel", held.path) == 0
    assert look(held).state == "cancelled" and held.record.cancelled.exists()
    run = jobs.training("run", settings=LaunchSettings(signal_seconds=600))
    wait(run, lambda one: one.state == "running")
    assert call("cancel", run.path, "--now") == 0
    found = look(run)
    assert (found.state, [one.outcome for one in found.attempts]) == ("cancelled", ["lost"])
    assert "Nothing was saved" in capsys.readouterr().out and jobs.cluster.jobs() == []


def test_a_controller_that_is_down(jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    run = jobs.training("run")
    wait(run, lambda one: one.state == "running")
    jobs.cluster.stop_controller()
    try:
        started = time.monotonic()
        assert call("status", run.path, "--json") == 0
        assert time.monotonic() - started < 30
        (data,) = json.loads(capsys.readouterr().out)
        assert data["state"] == "running" and "shown is what the files tell" in data["notes"][-1]
        assert call("cancel", run.path) == 2
        assert "cannot be cancelled from here" in capsys.readouterr().err and run.record.cancelled.exists()
    finally:
        jobs.cluster.start_controller()
    found = look(run)
    assert found.state == "running" and found.saves is None and isinstance(found.slurm, JobState)
