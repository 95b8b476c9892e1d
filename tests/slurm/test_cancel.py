"""`dist-train cancel` of jobs on this machine, and what it refuses; test_cancel_slurm.py has those on a cluster."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from slurm import cancel as cancelling
from slurm.record import LaunchRecord
from slurm.settings import LaunchSettings
from tests.end_to_end.commands import call, only_error
from tests.slurm.laid import Laid, here
from tests.slurm.terminal import on_terminal

# Like Submitit's controller with a rank: asked to stop it saves, tells whether the run was marked by then, and ends.
CONTROLLER = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
run, saves = Path(sys.argv[1]), sys.argv[2] == "saves"
rank = subprocess.Popen(["sleep", "600"])
def stop(number, frame):
    if saves:
        rank.kill()
        attempt = json.loads((run / "slurm/attempts.jsonl").read_text().splitlines()[0])
        marked = "marked" if (run / "slurm/cancelled").exists() else "not marked"
        attempt |= {"ended": time.time(), "last_step": 9, "outcome": "stopped", "decision": "stop", "reason": marked}
        with (run / "slurm/attempts.jsonl").open("a") as file:
            file.write(json.dumps(attempt) + "\\n")
        os._exit(1)
signal.signal(signal.SIGTERM, stop)
(run / "ready").write_text(str(rank.pid))
while True:
    time.sleep(0.1)
"""


class LocalRun(Laid):
    """A run whose controller is a process of this machine."""

    def __init__(self, path: Path, *, saves: bool, seconds: int = 60) -> None:
        super().__init__(path)
        code = [sys.executable, "-c", CONTROLLER, str(path), "saves" if saves else "not"]
        self.process = subprocess.Popen(code)
        job = str(self.process.pid)
        self.submitted(job, cluster="local", ago=0, settings=LaunchSettings(signal_seconds=seconds))
        self.attempt(job, ago=0, nodes=[platform.node()], ranks=1)
        self.beats(here(self.process.pid))
        deadline = time.monotonic() + 60
        while not (path / "ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.05)  # the file is there before its text
        self.rank = psutil.Process(int((path / "ready").read_text()))


@pytest.fixture
def made(tmp_path: Path) -> Iterator[list[LocalRun]]:
    """Runs whose processes end with the test."""
    runs: list[LocalRun] = []
    yield runs
    for run in runs:
        for process in (run.process, run.rank):
            if psutil.pid_exists(process.pid):
                process.kill()
        run.process.wait()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions come more often."""
    monkeypatch.setattr(cancelling, "POLL", 0.1)


def test_it_is_marked_then_saves_and_ends(
    made: list[LocalRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = LocalRun(tmp_path / "run", saves=True)
    made.append(run)
    run.saved(9)
    assert call("cancel", run.path) == 0
    out, err = capsys.readouterr()
    assert run.process.wait(10) == 1 and gone(run.rank)
    last = LaunchRecord(run.path).read_attempts()[-1]
    assert (last.outcome, last.reason) == ("stopped", "marked")
    assert "to save and end" in err and "Saved last: step 9" in out
    assert f"Go on with: dist-train submit r.yaml --output {run.path} --resume" in out
    assert call("status", run.path, "--json") == 0
    (data,) = json.loads(capsys.readouterr().out)
    assert (data["state"], data["next"][0]["command"]) == ("cancelled", out.partition("Go on with: ")[2].strip())
    assert call("cancel", run.path) == 0 and "nothing to cancel" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--now"], []])
def test_what_does_not_save_in_time_is_killed_with_its_ranks(
    words: list[str], made: list[LocalRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = LocalRun(tmp_path / "run", saves=False, seconds=600 if words else 1)
    made.append(run)
    assert call("cancel", run.path, *words) == 0
    assert run.process.wait(10) < 0 and gone(run.rank)
    assert "Nothing was saved" in capsys.readouterr().out and run.record.cancelled.exists()


def test_ctrl_c_ends_the_waiting_alone(made: list[LocalRun], tmp_path: Path) -> None:
    run = LocalRun(tmp_path / "run", saves=False)
    made.append(run)
    with on_terminal("cancel", run.path) as terminal:
        terminal.until("waiting up to 1 min")
        terminal.press("\x03")
        code, text = terminal.end()
    assert code == 130 and "It goes on saving" in text and "Traceback" not in text
    assert run.process.poll() is None and run.record.cancelled.exists()


def test_what_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    sleeping = subprocess.Popen(["/bin/sleep", "600"])
    try:
        by_hand = Laid(tmp_path / "hand")
        by_hand.beats(here(sleeping.pid))
        line = refused(capsys, by_hand.path)
        assert "started by hand" in line and f"Stop it by kill -TERM {sleeping.pid}" in line
        other = Laid(tmp_path / "other")
        other.submitted(str(sleeping.pid), cluster="local", host="elsewhere")
        assert "runs on elsewhere" in refused(capsys, other.path) and other.record.cancelled.exists()
        assert sleeping.poll() is None
    finally:
        sleeping.kill()
        sleeping.wait()
    unreachable = Laid(tmp_path / "unreachable")
    unreachable.submitted("12")
    line = refused(capsys, unreachable.path)
    assert line.startswith("job 12: cannot be cancelled from here (scancel: not found on PATH). The run is marked")
    assert unreachable.record.cancelled.exists()


def gone(process: psutil.Process) -> bool:
    """It ended, whether or not somebody has asked how."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def refused(capsys: pytest.CaptureFixture[str], run: Path) -> str:
    """The one error line of `cancel`."""
    code = call("cancel", run)
    return only_error(code, capsys.readouterr().err)
