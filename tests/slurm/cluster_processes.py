"""Daemons of a test cluster: started in sessions of their own, remembered in pid files, killed by those."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tests.slurm.cluster_settings import ClusterError

POLL = 0.05


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Ask again and again until it is true; False when it is not within `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(POLL)
    return True


class Stat(NamedTuple):
    """Of /proc/PID/stat: state letter, parent, start time in clock ticks since boot."""

    state: str
    parent: int
    started: int


def stat(pid: int) -> Stat | None:
    """None when there is no such process."""
    try:
        # the command's name in parentheses may hold spaces
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Stat(fields[0], int(fields[1]), int(fields[19]))


def running(pid: int) -> bool:
    """Whether the process exists and is not a zombie that nobody has waited for."""
    now = stat(pid)
    return now is not None and now.state not in "ZX"


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def children(pid: int) -> list[int]:
    """Running children. From every process's parent: not all kernels have /proc/PID/task/*/children."""
    everybody = (int(entry.name) for entry in Path("/proc").glob("[0-9]*"))
    return [child for child in everybody if parent(child) == pid]


def parent(pid: int) -> int | None:
    now = stat(pid)
    return now.parent if now and now.state not in "ZX" else None


def descendants(pid: int) -> list[int]:
    return [found for child in children(pid) for found in (child, *descendants(child))]


class Processes:
    """The processes of one lab directory."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self.run = directory / "run"
        self.log = directory / "log"
        self.environment = environment

    def start(self, name: str, command: list[str], *, keep_open: tuple[int, ...] = ()) -> subprocess.Popen[bytes]:
        """Start a daemon that stays in the foreground; its output goes to log/NAME.out, its pid to run/NAME.json."""
        with (self.log / f"{name}.out").open("ab") as out:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                pass_fds=keep_open,
                env={**os.environ, **self.environment},
            )
        now = stat(process.pid)
        started = now.started if now else 0
        (self.run / f"{name}.json").write_text(
            json.dumps({"pid": process.pid, "started": started, "last": command[-1]})
        )
        return process

    def pid(self, name: str) -> int | None:
        """The pid that `start` wrote, while it is still that process: by its start time and its command line."""
        try:
            written = json.loads((self.run / f"{name}.json").read_text())
        except FileNotFoundError:
            return None
        now = stat(written["pid"])
        if now is None or now.state in "ZX" or now.started != written["started"]:
            return None
        # the last word: `ip netns exec` turns into the command it was given
        return written["pid"] if written["last"] in command_line(written["pid"]) else None

    def await_ready(
        self, name: str, process: subprocess.Popen[bytes], ready: Callable[[], bool], seconds: float = 60.0
    ) -> None:
        """Wait until a daemon that was just started answers.

        Raises:
            ClusterError: it ended, or did not answer in time; with the end of its log.
        """
        end = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < end:
            if ready():
                return
            time.sleep(POLL)
        how = f"ended with code {process.returncode}" if process.poll() is not None else f"no answer in {seconds:.0f} s"
        raise ClusterError(f"{name}: {how}\n{self.tail(name)}")

    def tail(self, name: str, lines: int = 5) -> str:
        """The last lines a daemon logged, or wrote before it had a log, under the file's name."""
        for log in (self.log / f"{name}.log", self.log / f"{name}.out"):
            text = log.read_text(errors="replace").splitlines() if log.is_file() else []
            # Debian's Slurm looks for PMIx at each start and complains of its absence
            last = [line for line in text if "pmi" not in line][-lines:]
            if last:
                return "\n    ".join((f"  {log}:", *last))
        return f"  {self.log}/{name}.*: empty"

    def stop(self, name: str, sign: signal.Signals = signal.SIGKILL, seconds: float = 20.0) -> None:
        """Signal a daemon and wait for its end; no complaint when it does not run."""
        pid = self.pid(name)
        if pid is not None:
            # it leads its own session, so this reaches what it forked (slurmctld's slurmscriptd) as well
            with suppress(ProcessLookupError):
                os.killpg(pid, sign)
            if not wait_for(lambda: not running(pid), seconds):
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
                wait_for(lambda: not running(pid), 5)
        (self.run / f"{name}.json").unlink(missing_ok=True)
