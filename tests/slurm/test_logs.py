"""`dist-train logs`: tails, all ranks, following over requeues and submissions, errors alone."""

from __future__ import annotations

import random
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slurm import logs
from slurm.logs import Tail
from slurm.status import Files
from tests.end_to_end.commands import call, command, only_error
from tests.slurm.laid import Laid, age, here
from tests.slurm.terminal import on_terminal

JOB = "4711"


@pytest.fixture
def laid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Laid:
    """A submitted run of three ranks, without Slurm."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    laid = Laid(tmp_path / "run")
    laid.submitted(JOB)
    laid.attempt(JOB, nodes=["n1", "n2", "n3"], ranks=3)
    return laid


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives until it is killed."""
    sleeping = subprocess.Popen(["/bin/sleep", "600"])
    yield sleeping
    sleeping.kill()
    sleeping.wait()


def printed(capsys: pytest.CaptureFixture[str], *words: str | Path) -> list[str]:
    """Lines on stdout."""
    capsys.readouterr()
    assert call("logs", *words) == 0
    return capsys.readouterr().out.splitlines()


def test_tails(laid: Laid, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"line {number}" for number in range(random.randint(50, 5000))]
    out = laid.log(JOB, 0, "out", "\n".join(lines) + "\n")
    assert printed(capsys, laid.path) == lines[-40:]
    assert printed(capsys, laid.path, "-n", "3") == lines[-3:]
    assert printed(capsys, laid.path, "-n", "0") == []
    err = laid.log(JOB, 0, "err", "oh\nno, this is not complete")
    age(err, 60)
    expected = [f"==> {err} <==", "oh", "no, this is not complete", f"==> {out} <==", *lines[-2:]]
    assert printed(capsys, laid.path, "-n", "2") == expected  # the one written last comes last
    laid.log(JOB, 2, "out", "two\n")
    laid.log(JOB, 10, "err", "ten\n")
    laid.log("471", 1, "out", "of another job\n", folder=2)
    assert printed(capsys, laid.path, "--rank", "2") == ["two"]
    assert printed(capsys, laid.path, "--all", "-n", "1") == [
        "0: no, this is not complete", f"0: {lines[-1]}", "2: two", "10: ten"
    ]  # fmt: skip
    (laid.record.jobs / "10").mkdir()  # the same id again, in the newest folder
    laid.log(JOB, 0, "out", "new\n", folder=10)
    assert printed(capsys, laid.path) == ["new"]


def test_what_is_not_there_is_told(laid: Laid, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str | Path) -> str:
        code = call("logs", *words)
        return only_error(code, capsys.readouterr().err)

    assert "has no output yet: job 4711 is" in refused(laid.path)
    laid.log(JOB, 2, "out", "two\n")
    assert "no output of rank 7 of job 4711. There is output of rank 2." in refused(laid.path, "--rank", "7")
    assert "--all" in refused(laid.path, "--rank", "7", "--all")
    assert "--errors" in refused(laid.path, "--errors", "--follow")
    by_hand = Laid(tmp_path / "hand")
    (by_hand.path / "logs/rank_1.log").write_text("one\n")
    assert "writes to the terminal that started it. There is output of rank 1." in refused(by_hand.path)
    assert printed(capsys, by_hand.path, "--rank", "1") == ["one"]


def test_a_growing_file_is_read_once_and_whole(tmp_path: Path) -> None:
    """Pieces cut anywhere, in the middle of letters too; then the file is cut, then replaced."""
    path = tmp_path / "log"
    text = "".join(random.choices("aé\n𝄞 ", weights=[6, 2, 2, 1, 1], k=random.randint(100, 3000))) + "\n"
    data, found = text.encode(), []
    tail = Tail(path)
    assert tail.more() == []
    while data:
        count = random.randint(1, 200)
        with path.open("ab") as file:
            file.write(data[:count])
        data = data[count:]
        found += tail.more()
    assert found == text.split("\n")[:-1]
    shown = Tail(path)
    assert shown.last(5) == found[-5:] and shown.more() == []
    path.write_text("a\n")
    assert tail.more() == ["a"] and shown.more() == ["a"]
    (tmp_path / "new").write_text("longer than before\nb")
    (tmp_path / "new").replace(path)
    assert tail.more() == ["longer than before"]
    path.open("a").write("c\n")
    assert tail.more() == ["bc"]


def test_following_over_requeues_and_a_new_submission(
    tmp_path: Path,
    process: subprocess.Popen[bytes],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ends by itself once the run is over; what was not complete is completed, nothing comes twice."""
    laid = Laid(tmp_path / "run")
    pid = str(process.pid)
    laid.submitted(pid, cluster="local", ago=0)
    laid.log(pid, 0, "out", "early\nhal")

    def again() -> None:
        laid.submitted(pid, cluster="local", ago=0)
        laid.log(pid, 0, "out", "of the second submission\n", folder=2)

    def kill() -> None:
        laid.log(pid, 1, "err", "last words\n", folder=2)
        process.kill()
        process.wait()

    happens: list[Callable[[], Any]] = [
        lambda: laid.log(pid, 0, "out", "f a line\n"),
        lambda: laid.attempt(pid, 0, ago=0, ranks=2, nodes=["here"]),
        lambda: laid.log(pid, 1, "err", "of another rank\n"),
        lambda: laid.beats(here(1), step=1),
        again,
        kill,
    ]

    def sleep(seconds: float) -> None:
        if happens:
            happens.pop(0)()

    monkeypatch.setattr(logs, "ASK", -1.0)
    files = Files(laid.path)
    tails = {path: Tail(path) for path in logs.chosen(files, None)}
    first = [line for tail in tails.values() for line in tail.more()]
    assert first == ["early"] and logs.following(files, None, tails, sleep=sleep) == 0
    assert not happens
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "0: half a line", "1: of another rank", "0: of the second submission", "1: last words"
    ]  # fmt: skip
    states = [line.split(":")[0] for line in err.splitlines()]
    assert states == ["-- starting", "-- running", "-- failed"]


def test_ctrl_c_ends_following(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    laid = Laid(tmp_path / "run")
    pid = str(process.pid)
    laid.submitted(pid, cluster="local", ago=0)
    with on_terminal("logs", laid.path, "--follow") as terminal:
        terminal.until("-- starting")  # it waits for the first output
        laid.log(pid, 0, "err", "here it comes\n")
        terminal.until("here it comes")
        terminal.press("\x03")
        code, text = terminal.end()
    assert code == 130 and "Traceback" not in text and process.poll() is None


def test_errors_alone(laid: Laid, capsys: pytest.CaptureFixture[str]) -> None:
    laid.log(JOB, 0, "out", "all is well\n")
    assert printed(capsys, laid.path, "--errors") == [
        "No rank has reported an error, and there are no tracebacks and no stacks."
    ]
    laid.reported(JOB, 0, 1, ["rank 1 on n2", "ValueError: \x1b[2J1", "Its log has the traceback."])
    laid.reported(JOB, 0, 2, ["data.path", "is gone", "Mount it"])
    laid.attempt(JOB, 1, ago=1)  # this one has none yet
    trace = 'Traceback (most recent call last):\n  File "a.py", line 1\nKeyError: 1\n'
    trace += '[rank1]: Traceback (most recent call last):\n[rank1]:   File "a.py", line 1\n[rank1]: ValueError: 1\n'
    err = laid.log(JOB, 1, "err", f"warning\n{trace}after\n")
    (laid.path / "logs/rank_2.stacks.txt").write_text("Thread 0x1:\n  File x\n")
    (laid.path / "logs/rank_0.stacks.txt").write_text("")
    text = "\n".join(printed(capsys, laid.path, "--errors"))
    assert text.split("\n\n") == [
        "attempt 4711.0: rank 1 on n2: ValueError: \\x1b[2J1. Its log has the traceback.",
        "attempt 4711.0: rank 2 on n3: data.path: is gone. Mount it.",
        f'==> rank 1: {err} <==\n[rank1]: Traceback (most recent call last):\n[rank1]:   File "a.py", line 1\n'
        "[rank1]: ValueError: 1",
        f"==> rank 2: {laid.path}/logs/rank_2.stacks.txt <==\nThread 0x1:\n  File x",
    ]
    assert len(printed(capsys, laid.path, "--errors", "--rank", "2")) == 5


def test_a_reader_that_leaves_early(laid: Laid) -> None:
    laid.log(JOB, 0, "out", "x" * 90 + "\n" * 100_000)
    shell = f"{shlex.join(command('logs', laid.path, '-n', '100000'))} | /usr/bin/head -1"
    done = subprocess.run(["/bin/sh", "-c", shell], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() in ("x" * 90, "") and "Traceback" not in done.stderr and "Exception" not in done.stderr
