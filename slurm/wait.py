"""`dist-train submit --wait`: until a run and what follows it are over."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from pathlib import Path

from sharding.launch import HUNG, INTERRUPTED
from slurm.status import Files, RunStatus, gather

POLL = 5.0  # seconds
LIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED")
CODES = {"refused": 2, "hung": HUNG, "stopped": INTERRUPTED}  # of an attempt's outcome, as `dist-train train` ends
FAILED = 1


def wait_for(run: Path, say: Callable[[str], None]) -> int:
    """Waits, and says when a state changes. Returns the exit code: the run's, else that of what follows it."""
    told: list[str] = []
    try:
        while True:
            status = gather([Files(run)])[0]
            following = any(link.state in LIVE for link in status.chain)
            now = [": ".join(filter(None, (status.state, status.why)))]
            now += [f"{link.command}: {link.state.lower()}" for link in status.chain if status.over]
            for line in now:
                if line not in told:
                    say(f"{time.strftime('%H:%M:%S')}  {line}")
            told = now
            if status.over and not (following and status.state == "finished"):
                return code_of(status)
            time.sleep(POLL)
    except KeyboardInterrupt:
        say(f"Nothing was stopped. Look again with: dist-train status {shlex.quote(str(run))}")
        return INTERRUPTED


def code_of(status: RunStatus) -> int:
    """0 if all has come to its end."""
    if status.state == "finished":
        return 0 if all(link.state == "COMPLETED" for link in status.chain) else FAILED
    last = status.attempts[-1].outcome if status.attempts else None
    return CODES.get(last or "", FAILED)
