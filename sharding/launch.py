"""Starting several ranks on this machine, and ending them together."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from sharding.errors import UserError, UserErrors

GRACE = 10.0  # seconds a rank gets to end by itself after another one has failed
INTERRUPTED = 130  # exit code of what was asked to stop, as shells have it
HUNG = 75  # of a job that stood still; sysexits.h: a temporary failure, try again
FAILED_RANK_FILE = "DIST_TRAIN_FAILED_RANK_FILE"  # environment variable: where a rank leaves its user errors


def run_local(command: Sequence[str], ranks: int, logs: Path) -> int:
    """`run_ranks` for a user's command.

    Returns:
        Exit code: 0, or that of the first rank that failed. Of a job that stood still what the ranks reported is
        printed.

    Raises:
        UserErrors: the mistakes the ranks reported, each once.
    """
    code, errors = run_ranks(command, ranks, logs)
    if errors and code != HUNG:
        raise UserErrors(errors)
    for error in errors:
        print(f"error: {error}", file=sys.stderr, flush=True)
    return code


def run_ranks(command: Sequence[str], ranks: int, logs: Path) -> tuple[int, list[UserError]]:
    """Runs `command` as `ranks` processes that find each other, rank 0 on this terminal, the others' output in
    logs/rank_N.log.

    SIGINT and SIGTERM are passed on once, so that the ranks can save and end; a second one kills them. When a
    rank fails the others, which wait for it in a
    collective, are ended after a grace period.

    Returns:
        Exit code: 0, or that of the first rank that failed; and what the ranks reported, each once.
    """
    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.glob("rank_*.error.json"):
        old.unlink()
    port = free_port()
    processes: list[subprocess.Popen[bytes]] = []
    stops = 0

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal stops
        stops += 1
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGINT if stops == 1 else signal.SIGKILL)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for rank in range(ranks):
            processes.append(start_rank(command, rank, ranks, port, logs))
        failed = wait_for_all(processes)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
    code = 0 if failed is None else processes[failed].returncode
    if code == -signal.SIGKILL and not stops:
        print(f"error: {killed(failed)}", file=sys.stderr, flush=True)
    return code, reported_errors(logs)


def start_rank(command: Sequence[str], rank: int, ranks: int, port: int, logs: Path) -> subprocess.Popen[bytes]:
    """One rank, in a session of its own so that the terminal's Ctrl-C reaches it only through the launcher."""
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks))),
        FAILED_RANK_FILE: str(logs / f"rank_{rank}.error.json"),
    }
    if rank == 0:
        return subprocess.Popen(command, env=environment, start_new_session=True)
    with (logs / f"rank_{rank}.log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def wait_for_all(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Waits until all have ended; after a failure the rest is killed when the grace period is over. Returns the rank
    that failed first.
    """
    first, deadline = None, float("inf")
    while True:
        codes = [process.poll() for process in processes]
        if first is None:
            first = next((rank for rank, code in enumerate(codes) if code), None)
            deadline = float("inf") if first is None else time.monotonic() + GRACE
        if None not in codes:
            return first
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.05)


def killed(rank: int | None) -> UserError:
    """What is told of a rank that was killed from outside."""
    return UserError(
        f"rank {rank}",
        "was killed, by the system if memory ran out (see dmesg)",
        "Take fewer clips at once (data.budget, training.accumulation) or fewer ranks; a training run goes on from its "
        "last checkpoint with --resume.",
    )


def launched() -> bool:
    """Whether this process is a rank that run_local started."""
    return FAILED_RANK_FILE in os.environ


def report_errors(errors: Sequence[UserError]) -> None:
    """Leaves a rank's user errors for the launcher, or prints them where there is none."""
    place = os.environ.get(FAILED_RANK_FILE)
    if place is not None:
        rows = [[error.where, error.problem, error.remedy] for error in errors]
        try:
            Path(place).write_text(json.dumps(rows))
            return
        except OSError:  # the full or read-only disk that is the error may be this one
            with contextlib.suppress(OSError):
                Path(place).unlink()
    for error in errors:
        print(f"error: {error}", file=sys.stderr, flush=True)


def reported_errors(logs: Path) -> list[UserError]:
    """What the ranks left, without repetitions."""
    rows: dict[tuple[str, str, str], None] = {}
    for path in sorted(logs.glob("rank_*.error.json")):
        rows.update(dict.fromkeys(tuple(row) for row in json.loads(path.read_text())))
    return [UserError(*row) for row in rows]


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
