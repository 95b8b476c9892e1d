"""What `dist-train status` tells of runs by hand, of submitted ones, and of damaged directories."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, Group

from slurm import progress as progress_module
from slurm import status
from slurm.queue import JobState
from slurm.record import ChainLink, Failure
from slurm.status import Files, RunStatus, status_of
from slurm.status_table import screen
from tests.end_to_end.commands import call, run
from tests.slurm.laid import AGAIN, JOB, Laid, age, here
from tests.slurm.terminal import on_terminal


@pytest.fixture
def laid(tmp_path: Path) -> Laid:
    return Laid(tmp_path / "run")


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives until it is killed."""
    sleeping = subprocess.Popen(["sleep", "600"])
    yield sleeping
    sleeping.kill()
    sleeping.wait()


def look(laid: Laid, **job: Any) -> RunStatus:
    """The status, if Slurm says that of job JOB."""
    return status_of(Files(laid.path), {JOB: said(**job)} if job else {})


def said(**job: Any) -> JobState:
    """What Slurm says of a job; times are given in seconds ago."""
    return JobState(**job | {name: stamp(job[name]) for name in ("start", "end") if name in job})


def printed(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """What a command prints on stdout, in one line."""
    capsys.readouterr()
    assert call(*words) == 0
    return " ".join(capsys.readouterr().out.split())


def test_a_run_by_hand_from_its_start_to_its_end(
    laid: Laid,
    process: subprocess.Popen[bytes],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    age(laid.path / "recipe.yaml", 5)
    assert look(laid).state == "starting"
    age(laid.path / "recipe.yaml", 500)
    laid.beats(here(process.pid), here(process.pid), phase="loading", step=0)
    assert look(laid).state == "starting"

    count, total, seconds = random.randint(60, 90), random.randint(100, 200), random.uniform(0.1, 2)
    laid.steps(count, total=total, seconds=seconds)
    row = {"kind": "eval", "step": count, "epoch": 2, "seconds": 10 * seconds}
    with (laid.path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n" + '{"kind": "step", "step"')  # being written
    laid.beats(here(process.pid), here(process.pid), step=count)
    found = look(laid)
    progress = found.progress
    assert (found.state, progress.step, progress.total_steps, progress.epochs) == ("running", count, total, 4)
    assert progress.loss == pytest.approx(1 / count) and progress.clips_per_second == pytest.approx(8 / seconds)
    # ten steps' time was spent on validation in `count` steps
    assert progress.seconds_left == pytest.approx((total - count) * seconds * (1 + 10 / count))
    assert found.training_ends == pytest.approx(time.time() + (progress.seconds_left or 0), abs=30)
    text = printed(capsys, "status", laid.path)
    assert f"{count} of {total}" in text and f"kill -TERM {process.pid}" in text

    laid.beats(here(process.pid), phase="saving", step=count)
    assert look(laid).state == "saving"
    laid.beats(here(process.pid), step=count)
    with monkeypatch.context() as patch:
        patch.setattr(progress_module, "SILENT", -1.0)
        assert look(laid).state == "suspended"
    laid.beats(here(process.pid), step=count, ago=300)
    assert look(laid).state == "failed"  # it began after they were last heard of: another process has their number
    laid.beats(f"elsewhere:{process.pid}", step=count)
    assert look(laid).state == "running"
    laid.beats(f"elsewhere:{process.pid}", step=count, ago=300)
    found = look(laid)
    assert found.state == "unknown" and "elsewhere" in found.why and "5 min ago" in found.why
    process.kill()
    process.wait()
    laid.beats(here(process.pid), step=count)
    found = look(laid)
    assert found.state == "failed" and "gone" in found.why
    assert found.next[-1].command == f"dist-train train {laid.path}/recipe.yaml --output {laid.path} --resume"
    (laid.path / "logs/heartbeat.json").unlink()
    assert look(laid).state == "stopped"
    laid.finished()
    assert look(laid).state == "finished"


def test_a_run_by_hand_that_reported_an_error_or_has_no_watchdog(tmp_path: Path) -> None:
    laid = Laid(tmp_path / "run", watchdog_seconds=None)
    laid.steps(3)
    assert look(laid).state == "running"
    age(laid.path / "metrics.jsonl", 100)
    assert look(laid).state == "stopped"
    (laid.path / "logs/rank_1.error.json").write_text(json.dumps([["data.path", "is gone", "Mount it"]]))
    found = look(laid)
    assert (found.state, found.why) == ("failed", "data.path: is gone. Mount it.")
    assert [(one.rank, one.error) for one in found.errors] == [(1, "data.path: is gone. Mount it.")]


def stamp(ago: float) -> str:
    """A time as Slurm prints it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() - ago))


RUNNING: dict[str, Any] = {"state": "RUNNING", "nodes": "n[1-2]", "start": 60, "end": -3600}  # both in seconds ago
GIVEN_UP = {**AGAIN, "decision": "stop", "reason": "3 attempts ended at step 7 in the same way: Killed"}
SAVED = {"outcome": "stopped", "last_step": 9, "ended": 1.0}


@pytest.mark.parametrize(
    ("job", "attempt", "beats", "state", "why"),
    [
        ({"state": "PENDING", "reason": "Resources"}, None, None, "pending", "waits for nodes to become free"),
        ({"state": "PENDING", "reason": "DependencyNeverSatisfied"}, None, None, "pending", "never start"),
        ({"state": "PENDING", "reason": "QOSMaxGRESPerUser"}, None, None, "pending", "(QOS)"),
        ({"state": "PENDING", "reason": "ReqNodeNotAvail, UnavailableNodes:n[3-4]"}, None, None, "pending", "(n[3-4])"),
        ({"state": "PENDING", "reason": "Unheard-of"}, None, None, "pending", "Unheard-of"),
        (
            {"state": "PENDING", "reason": "BeginTime"},
            AGAIN,
            None,
            "requeued",
            "rank 3 on n2: Killed; now it waits: its begin",
        ),
        ({"state": "PENDING", "reason": "BeginTime"}, {}, None, "requeued", "told no end"),
        ({**RUNNING, "state": "CONFIGURING"}, None, None, "starting", "prepared"),
        (RUNNING, None, None, "starting", "ranks start"),
        (RUNNING, {}, None, "starting", "load"),
        (RUNNING, {}, {"phase": "loading"}, "starting", "load"),
        (RUNNING, {}, {}, "running", ""),
        (RUNNING, {}, {"phase": "saving"}, "saving", ""),
        (RUNNING, {}, {"idle": 100.0}, "running", "rank 0 began nothing new for 100 s"),
        ({**RUNNING, "start": 20}, {}, {"ago": 40}, "starting", "ranks start"),  # that was the start before
        ({**RUNNING, "state": "SUSPENDED"}, {}, {}, "suspended", ""),
        ({**RUNNING, "state": "COMPLETING"}, {**SAVED, "decision": "requeue"}, None, "requeued", "stopped"),
        ({**RUNNING, "state": "COMPLETING"}, GIVEN_UP, None, "failed", "3 attempts"),
        ({"state": "FAILED", "exit_code": 1}, GIVEN_UP, None, "failed", "3 attempts"),
        ({"state": "FAILED", "exit_code": 1}, AGAIN, None, "failed", "exit code 1"),
        ({"state": "NODE_FAIL"}, {}, {"ago": 40}, "failed", "a node was lost"),
        ({"state": "TIMEOUT"}, {}, None, "failed", "time limit"),
        ({"state": "OUT_OF_MEMORY"}, {}, None, "failed", "memory"),
        ({"state": "UNKNOWN", "reason": "neither"}, {}, None, "failed", "forgotten"),
        ({"state": "CANCELLED"}, None, None, "cancelled", "before it began"),
        ({"state": "CANCELLED"}, {}, None, "cancelled", ""),
        (
            {"state": "FAILED", "exit_code": 2},
            None,
            None,
            "failed",
            "before the training began; it failed, exit code 2",
        ),
        ({"state": "COMPLETED"}, {**SAVED, "outcome": "finished", "decision": "done"}, None, "finished", ""),
        ({"state": "UNKNOWN", "reason": "squeue: no", "answered": False}, {}, {}, "running", ""),
        (
            {"state": "UNKNOWN", "reason": "squeue: no", "answered": False},
            {},
            {"ago": 999},
            "unknown",
            "16 min 39 s ago",
        ),
        (
            {"state": "UNKNOWN", "reason": "squeue: no", "answered": False},
            None,
            None,
            "unknown",
            "submitted 1 min 40 s",
        ),
        ({"state": "UNKNOWN", "reason": "squeue: no", "answered": False}, AGAIN, None, "requeued", "Killed"),
        ({"state": "UNKNOWN", "reason": "squeue: no", "answered": False}, GIVEN_UP, None, "failed", "3 attempts"),
    ],
)
def test_what_slurm_and_the_files_say_together(
    job: dict[str, Any],
    attempt: dict[str, Any] | None,
    beats: dict[str, Any] | None,
    state: str,
    why: str,
    laid: Laid,
    capsys: pytest.CaptureFixture[str],
) -> None:
    laid.submitted(JOB)
    if attempt is not None:
        laid.attempt(JOB)
        if attempt:
            laid.attempt(JOB, **attempt)
    if beats is not None:
        laid.beats(*["n1:7"] * 4, **beats)
    found = look(laid, **job)
    assert found.state == state and why in found.why
    assert bool(found.notes) is not job.get("answered", True)


def test_a_summary_counts_if_it_is_of_this_submission(laid: Laid) -> None:
    laid.finished(ago=300)
    laid.submitted(JOB)
    assert look(laid, state="FAILED").state == "failed"
    laid.finished()
    assert look(laid, state="FAILED").state == "finished"


def test_attempts_that_told_no_end_are_lost(laid: Laid) -> None:
    laid.submitted("77", ago=9000)
    laid.attempt("77", ago=8000)
    laid.submitted(JOB)
    laid.attempt(JOB, 0, ago=900)
    laid.attempt(JOB, 1, ago=800)
    laid.attempt(JOB, 1, ago=800, **AGAIN)
    laid.attempt(JOB, 2, ago=50)
    outcomes = [one.outcome for one in look(laid, **RUNNING).attempts]
    assert outcomes == ["lost", "lost", "failed", None]
    assert [one.outcome for one in look(laid, state="NODE_FAIL").attempts] == ["lost", "lost", "failed", "lost"]
    (laid.record.attempts).open("a").write('{"job": "123456", "restart": 3, "sta')  # cut by a power failure
    assert [one.outcome for one in look(laid, **RUNNING).attempts] == outcomes


def shown(found: RunStatus) -> str:
    """The screen, in one line."""
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(Group(*screen([found])))
    return " ".join(console.export_text().split())


def test_one_screen(laid: Laid) -> None:
    """All at once: time limit before the end of training, a restart, errors of two ranks, a job that follows."""
    laid.submitted(JOB, chain=[ChainLink(command="dist-train evaluate run", job="123457")])
    laid.attempt(JOB, **AGAIN, excluded=["n9"])
    laid.reported(JOB, 0, 0, ["rank 0 on n1", "ConnectionError: peer", "Its log has the traceback"])
    laid.reported(JOB, 0, 2, ["rank 2 on n2", "ConnectionError: peer", "Its log has the traceback"])
    laid.reported(JOB, 0, 3, ["never", "shown", "as the failure tells it"])
    log = laid.log(JOB, 3, "err", "Killed\n")
    laid.saved(6)
    following = {"123457": JobState("PENDING", "Dependency")}
    found = status_of(Files(laid.path), {JOB: JobState("PENDING", "BeginTime"), **following})
    assert [(one.rank, one.node, one.log) for one in found.errors] == [(3, "n2", log), (0, "n1", None), (2, "n2", None)]
    assert found.progress.saved_step == 6
    text = shown(found)
    for part in (
        "REQUEUED job 123456", "step 6, just now", "requeue: Killed (without n9)", "0–7", "rank 3 on n2: Killed",
        str(log), "ranks 0, 2 on n1, n2: ConnectionError", "evaluate run (job 123457): pending",
        "it waits for another job", f"dist-train cancel {laid.path}", str(log.parent),
    ):  # fmt: skip
        assert part in text, (part, text)
    laid.attempt(JOB, 1, ago=10)
    laid.steps(7, total=1000, seconds=60)
    laid.beats(*["n1:7"] * 4, step=7)
    found = status_of(Files(laid.path), {JOB: said(**{**RUNNING, "start": 20}), **following})
    assert found.state == "running" and found.errors == [] and found.limit is not None
    assert found.saves == found.limit - 30
    assert "it saves, is requeued and goes on" in shown(found)
    laid.steps(8, total=10)
    assert "it saves, is requeued" not in shown(
        status_of(Files(laid.path), {JOB: said(**RUNNING), **following})
    )  # the training ends before


def test_several_runs_are_a_line_each_and_what_is_none_is_named_at_the_end(
    tmp_path: Path, laid: Laid, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    other = Laid(tmp_path / "other")
    other.steps(5)
    (tmp_path / "empty").mkdir()
    laid.steps(7)
    laid.finished(ago=-1)
    code = call("status", laid.path, tmp_path / "empty", other.path, tmp_path / "absent")
    out, err = capsys.readouterr()
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith(str(tmp_path))}
    assert code == 2 and "finished" in rows[str(laid.path)] and "7/100" in rows[str(laid.path)]
    assert "stopped" in rows[str(other.path)] and "5/100" in rows[str(other.path)]
    assert [line.split(": ")[1] for line in err.splitlines()] == [str(tmp_path / "empty"), str(tmp_path / "absent")]


def test_without_slurm_the_files_tell(
    laid: Laid, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    laid.submitted(JOB)
    laid.attempt(JOB)
    laid.beats("n1:7", step=3)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert "RUNNING" in (text := printed(capsys, "status", laid.path))
    assert "tells nothing of job 123456 (squeue: not found on PATH): shown is what the files tell" in text
    script(tmp_path / "bin/squeue", "exec /bin/sleep 60")
    monkeypatch.setattr(status, "ASK_SECONDS", 0.3)
    before = time.monotonic()
    assert "no answer within 0.3 s" in printed(capsys, "status", laid.path) and time.monotonic() - before < 20


def script(path: Path, body: str) -> None:
    """A command on PATH."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("job", ["--user=root", "1;id", "1,2", "", "9" * 100_000, "١٢", "12_", "-1", "a\0b", "../../x"])
def test_what_is_no_job_id_is_never_put_into_a_command(
    job: str, laid: Laid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("squeue", "sacct", "scancel"):
        script(tmp_path / name, f"echo {name} >> {tmp_path}/called")
    monkeypatch.setenv("PATH", str(tmp_path))
    laid.submitted(JOB, chain=[ChainLink(command="x", job=job)])
    laid.submitted(job, submitted=float("-inf"))
    laid.attempt(job, ago=float("inf"), failures=[Failure(rank=1 << 99, error="\x1b[2J")], outcome="failed")
    assert "is no job id" in printed(capsys, "status", laid.path)
    for words in (["logs"], ["logs", "--errors"], ["cancel"]):
        assert call(*words, laid.path) in (0, 2)
    assert "which is no job id" in capsys.readouterr().err
    assert not (tmp_path / "called").exists()


def test_a_local_job_is_its_process(laid: Laid, process: subprocess.Popen[bytes]) -> None:
    pid = str(process.pid)
    laid.submitted(pid, cluster="local", ago=0)
    assert look(laid).state == "starting"
    laid.attempt(pid, ago=0, nodes=["here"], ranks=2)
    laid.beats(here(1), here(1))
    assert look(laid).state == "running"
    laid.submitted(pid, cluster="local", ago=3600)  # before the process of that number began
    assert look(laid).state == "failed"
    laid.submitted(pid, cluster="local", host="elsewhere")
    found = look(laid)
    assert found.state == "running" and "elsewhere" in found.notes[-1]
    laid.submitted(pid, cluster="local", ago=0)
    process.kill()
    process.wait()
    found = look(laid)
    assert found.state == "failed" and "process has ended" in found.why
    laid.submitted("9" * 30, cluster="local", ago=0)
    assert look(laid).state == "failed"


def test_torch_is_not_imported(laid: Laid) -> None:
    laid.submitted(JOB)
    laid.attempt(JOB)
    for words in (["status", laid.path], ["logs", laid.path, "--errors"]):
        code = (
            f"import sys; from dist_train.cli import main\ntry: main(args={[str(word) for word in words]})\n"
            "except SystemExit as end: assert not end.code, end.code\n"
            "print(*{'torch', 'transformers', 'submitit', 'numpy'} & sys.modules.keys(), file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stderr == "\n"


def test_watching_ends_with_the_run_or_ctrl_c_and_harms_nothing(laid: Laid, process: subprocess.Popen[bytes]) -> None:
    laid.steps(3)
    laid.beats(here(process.pid))
    before = {path: path.read_bytes() for path in laid.path.rglob("*") if path.is_file()}
    with on_terminal("status", laid.path, "--watch") as terminal:
        terminal.until("3 of 100")
        laid.steps(4)
        terminal.until("4 of 100")
        terminal.press("\x03")
        code, text = terminal.end()
    assert code == 130 and "Traceback" not in text and "Error" not in text
    after = {path: path.read_bytes() for path in laid.path.rglob("*") if path.is_file()}
    assert process.poll() is None
    assert before.keys() == after.keys() and [path.name for path in before if before[path] != after[path]] == [
        "metrics.jsonl"
    ]
    with on_terminal("status", laid.path, "--watch") as terminal:
        terminal.until("4 of 100")
        laid.finished(ago=-1)
        (laid.path / "logs/heartbeat.json").unlink()
        code, text = terminal.end()
    assert code == 0 and "FINISHED" in text
    refused = run("status", laid.path, "--watch", "--json")
    assert refused.returncode == 2 and refused.stderr.startswith("error: --watch")
