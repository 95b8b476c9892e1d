"""Local ranks start together and end together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sharding import launch
from sharding.errors import UserError, UserErrors
from tests.corpus import forbidden_directory

HEAD = "import os, sys, time, signal\nrank = int(os.environ['RANK'])\n"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", HEAD + code]


def test_ranks_know_each_other(tmp_path: Path) -> None:
    names = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    code = f"open(f'{tmp_path}/{{rank}}', 'w').write(' '.join(os.environ[name] for name in {names}))"
    assert launch.run_local(python(code), 3, tmp_path / "logs") == 0
    seen = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [row[:2] for row in seen] == [["3", "0"], ["3", "1"], ["3", "2"]]
    assert len({row[2] for row in seen}) == 1


def test_a_failed_rank_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE", 0.5)
    started = time.monotonic()
    code = launch.run_local(python("sys.exit(7) if rank == 1 else time.sleep(60)"), 3, tmp_path)
    assert code == 7
    assert time.monotonic() - started < 20


def test_the_rank_that_was_killed_is_told_and_not_those_ended_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "GRACE", 0.3)
    dies = python("os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(60)")
    assert launch.run_local(dies, 3, tmp_path) == -signal.SIGKILL
    told = capfd.readouterr().err
    assert told.startswith("error: rank 1: was killed") and "--resume" in told and told.count("rank ") == 1
    launch.run_local(python("sys.exit(7) if rank == 1 else time.sleep(60)"), 3, tmp_path)
    assert "was killed" not in capfd.readouterr().err


def test_user_errors_of_ranks_come_up_once(tmp_path: Path) -> None:
    code = (
        "from sharding.errors import UserError; from sharding.launch import report_errors\n"
        "report_errors([UserError('key', 'is wrong', 'Mend it.')] + [UserError(f'rank {rank}', 'sees it', 'Look.')])\n"
        "sys.exit(2)"
    )
    with pytest.raises(UserErrors) as caught:
        launch.run_local(python(code), 2, tmp_path)
    assert sorted(str(error) for error in caught.value.errors) == [
        "key: is wrong. Mend it.",
        "rank 0: sees it. Look.",
        "rank 1: sees it. Look.",
    ]
    assert launch.run_local(python("pass"), 1, tmp_path) == 0, "errors of an earlier start are gone"


def test_an_error_that_cannot_be_left_for_the_launcher_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with forbidden_directory(tmp_path / "logs") as logs:
        monkeypatch.setenv(launch.FAILED_RANK_FILE, str(logs / "rank_0.error.json"))
        launch.report_errors([UserError("disk", "is read-only", "Mend it.")])
    assert capsys.readouterr().err == "error: disk: is read-only. Mend it.\n"


def test_other_ranks_write_to_their_logs(tmp_path: Path) -> None:
    launch.run_local(python("print('from', rank)"), 2, tmp_path)
    launch.run_local(python("print('again', rank)"), 2, tmp_path)
    assert (tmp_path / "rank_1.log").read_text() == "from 1\nagain 1\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_rank_once(number: signal.Signals, tmp_path: Path) -> None:
    ranks = (
        "count = []\n"
        "signal.signal(signal.SIGINT, lambda *a: count.append(1))\n"
        f"open(f'{tmp_path}/ready{{rank}}', 'w').close()\n"
        "while not count: time.sleep(0.01)\n"
        f"time.sleep(0.5); open(f'{tmp_path}/{{rank}}', 'w').write(str(len(count)))"
    )
    parent = (
        "import sys; from pathlib import Path; from sharding.launch import run_local\n"
        f"sys.exit(run_local([sys.executable, '-c', {HEAD + ranks!r}], 2, Path({str(tmp_path)!r})))"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, number)
    assert process.wait(30) == 0
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["1", "1"]
