"""What `dist-train sweep` does, from the command line to the results."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from slurm.sweep import SweepRequest, submit_sweep
from slurm.sweep_record import SweepRecord
from slurm.sweep_results import write_results
from slurm.sweep_status import Look, Seen, follow, screen


def start(request: SweepRequest, say: Callable[[str], None], *, dry_run: bool, detach: bool) -> int:
    """Queues a sweep, and follows it unless it is to be left alone. Returns the exit code.

    Raises:
        UserError, UserErrors: something is wrong; see `submit_sweep`.
    """
    record = submit_sweep(request, say, dry_run=dry_run)
    if record is None:
        return 0
    place = shlex.quote(str(request.output))
    say(f"  look     dist-train sweep --status {place}  (one point: dist-train status {place}/POINT, logs, cancel)")
    say(f"  stop     {how_to_stop(record, request)}")
    say("  go on    the same command with --resume: points that finished are left alone")
    return 0 if detach else look_at(request.output, say, watch=True)


def how_to_stop(record: SweepRecord, request: SweepRequest) -> str:
    """The command that has all points save and end."""
    pool = record.read_pool()
    if request.cluster == "local" and pool is not None:
        return f"kill {pool.process}  (what runs saves and ends; the rest is not started)"
    return f"for run in {shlex.quote(str(request.output))}/*/; do dist-train cancel $run; done"


def look_at(directory: Path, say: Callable[[str], None], *, watch: bool) -> int:
    """Shows how a sweep is, and writes what it has found by now. Returns the exit code.

    Args:
        watch: until all points are over; the code then tells whether all have finished.

    Raises:
        UserError: it is no sweep, or its results cannot be written.
    """
    record = SweepRecord(directory)
    look = Look(record)

    def done(seen: Sequence[Seen]) -> None:
        paths = write_results(record, seen)
        say(f"Wrote {', '.join(path.name for path in paths)} to {directory}")

    if watch:
        return follow(look, done)
    seen = look()
    Console().print(screen(look, seen))
    done(seen)
    return 0
