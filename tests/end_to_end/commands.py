"""Running `dist-train` as a user does, in this process or in one of its own, and what it printed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dist_train.cli import main

REFUSED = 2  # exit code of a command whose input is wrong
INTERRUPTED = (130, -signal.SIGINT)  # shells show 130 for both
Refused = Callable[..., list[str]]  # what the fixture `refused` gives


def command(*words: str | Path) -> list[str]:
    """The command line of a process of its own."""
    return [sys.executable, "-m", "dist_train.cli", *map(str, words)]


def run(*words: str | Path, limit: float = 200, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process of its own, which must end by itself within `limit` seconds."""
    return subprocess.run(
        command(*words), capture_output=True, text=True, timeout=limit, check=False, env={**os.environ, **variables}
    )


def call(*words: str | Path) -> int:
    """Runs a command in this process; returns its exit code."""
    with pytest.raises(SystemExit) as ended:
        main(args=list(map(str, words)), prog_name="dist-train")
    return int(ended.value.code or 0)


def errors(printed: str) -> list[str]:
    """What follows `error: ` on the lines of stderr."""
    return [line.removeprefix("error: ") for line in printed.splitlines() if line.startswith("error: ")]


def only_error(code: int | None, printed: str) -> str:
    """The one error line of a refused command, of its exit code and stderr."""
    assert code == REFUSED and "Traceback" not in printed, printed
    (line,) = errors(printed)
    return line


def refusal(*words: str | Path, **options: Any) -> str:
    """The one error line of a command that is refused in a process of its own."""
    done = run(*words, **options)
    return only_error(done.returncode, done.stderr)


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[str], limit: float = 100) -> None:
    """Waits for something the process does while it runs."""
    deadline = time.monotonic() + limit
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


@contextmanager
def started(*words: str | Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A command that runs while the block does, in a process group of its own as under a terminal."""
    process = subprocess.Popen(
        command(*words),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **variables},
        # Where the tests run in the background, SIGINT is ignored and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=60)


def press_ctrl_c(process: subprocess.Popen[str], codes: Collection[int] = INTERRUPTED) -> None:
    """Interrupts a command as the terminal does; it must end soon, with one of these exit codes and no traceback."""
    os.killpg(process.pid, signal.SIGINT)
    printed = process.communicate(timeout=60)[1]
    assert process.returncode in codes and "Traceback" not in printed, (process.returncode, printed)


def metrics(run_directory: Path, kind: str = "step") -> list[dict[str, Any]]:
    """The lines of that kind in metrics.jsonl."""
    rows = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]
