"""Prints what the ranks of a run have written, as it is written if wanted, over requeues and new submissions."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sharding.errors import UserError, plain
from sharding.files import opened
from sharding.launch import INTERRUPTED
from slurm.log_files import job_logs, run_logs, stacks
from slurm.progress import modified
from slurm.status import Files, gather, rank_errors

MOST = 1 << 20  # bytes of a file looked at for its last lines, and read at once while following
POLL = 1.0  # seconds between looks at the files
ASK = 10.0  # seconds between looks at the run's state
READ = "It is left out."
TRACEBACK = re.compile(r"(\[rank\d+\]:\s?)?Traceback \(most recent call last\):")


class Tail:
    """Reads a file that grows; one that is replaced or cut is read anew.

    Args:
        path: need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position, self.inode, self.rest = 0, None, b""  # type: tuple[int, int | None, bytes]

    def last(self, lines: int) -> list[str]:
        """The last lines, one that is not complete included; `more` goes on after them."""
        data = self._read(from_end=True)
        found = data.split(b"\n")
        self.rest = b""
        if not found[-1]:
            found.pop()
        return [line.decode(errors="replace") for line in found[-lines:] if lines]

    def more(self) -> list[str]:
        """The lines completed since."""
        *complete, self.rest = (self.rest + self._read()).split(b"\n")
        return [line.decode(errors="replace") for line in complete]

    def _read(self, *, from_end: bool = False) -> bytes:
        try:
            with opened(self.path, READ) as (file, size):
                inode = os.fstat(file.fileno()).st_ino
                if size < self.position or inode != self.inode:
                    self.position, self.inode, self.rest = 0, inode, b""
                if from_end:
                    self.position = max(size - MOST, 0)
                file.seek(self.position)
                data = file.read(MOST)
                self.position += len(data)
                return data
        except (OSError, UserError):
            return b""


def show(run: Path, rank: int | None, *, every: bool, lines: int, follow: bool, only_errors: bool) -> int:
    """`dist-train logs`. Returns the exit code.

    Args:
        rank: whose output; None: rank 0's, or with `every` all.
        lines: last ones shown of each file.

    Raises:
        UserError: no run directory, nothing there to show, or options that do not go together.
    """
    files = Files(run)
    if every and rank is not None:
        raise UserError("--all", "prints all ranks, and --rank one", "Give one of them.")
    if only_errors and follow:
        raise UserError("--errors", "shows what was reported, and --follow what comes", "Give one of them.")
    if only_errors:
        return show_errors(files, rank)
    wanted = None if every else rank or 0
    logs = chosen(files, wanted)
    if not logs and not follow:
        raise UserError(str(run), *nothing(files, wanted))
    tails = {path: Tail(path) for path in logs}
    many = sum((modified(path) is not None and path.stat().st_size > 0) for path in logs) > 1
    for path, tail in tails.items():
        found = tail.last(lines)
        if found and many and not every:
            print(f"==> {path} <==")
        write(found, logs[path] if every else None)
    return following(files, wanted, tails) if follow else 0


def chosen(files: Files, rank: int | None) -> dict[Path, int]:
    """The log files of a rank, or of all, with the rank of each; the one written last comes last."""
    last = files.submission
    logs = run_logs(files.run) if last is None else job_logs(files.record, last.job, files.last_attempt)
    picked = {number: paths for number, paths in logs.items() if rank in (None, number)}
    return {
        path: number for number, paths in picked.items() for path in sorted(paths, key=lambda one: modified(one) or 0)
    }


def nothing(files: Files, rank: int | None) -> tuple[str, str]:
    """What is told where there is no output: problem and remedy."""
    last = files.submission
    there = sorted(set(chosen(files, None).values()))
    ranks = f"There is output of rank{'s' * (len(there) > 1)} {', '.join(map(str, there[:8]))}."
    if last is None:
        own = "rank 0 of a run by hand writes to the terminal that started it" if rank in (0, None) else "none is there"
        return (
            f"has no output of {'any rank' if rank is None else f'rank {rank}'}: {own}",
            ranks if there else "See there.",
        )
    if there:
        return f"has no output of rank {rank} of job {plain(last.job)}", ranks
    found = gather([files])[0]
    why = f" ({found.why})" if found.why else ""
    return f"has no output yet: job {plain(last.job)} is {found.state}{why}", "--follow waits for it."


def write(lines: Sequence[str], rank: int | None) -> None:
    """Prints lines, after their rank if it is given."""
    if lines:
        start = "" if rank is None else f"{rank}: "
        sys.stdout.write("".join(f"{start}{line}\n" for line in lines))
        sys.stdout.flush()


def following(
    files: Files, rank: int | None, tails: dict[Path, Tail], *, sleep: Callable[[float], Any] = time.sleep
) -> int:
    """Prints what comes until the run is over or Ctrl-C is pressed; tells on stderr when its state changes."""
    state, asked, over = "", float("-inf"), False
    try:
        while True:
            if time.monotonic() - asked > ASK:
                files = Files(files.run)
                found = gather([files])[0]
                asked, over = time.monotonic(), found.over
                if found.state != state:
                    state = found.state
                    print(f"-- {state}{f': {found.why}' if found.why else ''}", file=sys.stderr, flush=True)
            came = False
            for path, number in chosen(files, rank).items():
                new = tails.setdefault(path, Tail(path)).more()
                write(new, number if rank is None else None)
                came = came or bool(new)
            if over and not came:
                return 0
            sleep(POLL if not came else POLL / 10)
    except KeyboardInterrupt:
        return INTERRUPTED


def show_errors(files: Files, rank: int | None) -> int:
    """Prints what ranks have reported in the last attempt that failed, their last tracebacks, and their stacks."""
    parts = [part for part in (*reports_of(files, rank), *tracebacks(files, rank), *stacks_of(files, rank)) if part]
    print("\n\n".join(parts) if parts else "No rank has reported an error, and there are no tracebacks and no stacks.")
    return 0


def reports_of(files: Files, rank: int | None) -> Iterator[str]:
    """Reports and failures of the last attempt that has some."""
    last = files.submission
    attempts = [one for one in files.attempts if last is not None and one.job == last.job]
    for count in range(len(attempts), -1 if last is None else 0, -1):
        errors = [one for one in rank_errors(files, attempts[:count]) if rank in (None, one.rank)]
        if errors:
            which = f"attempt {attempts[count - 1].job}.{attempts[count - 1].restart}: " if count else ""
            for one in errors:
                who = one.node or "the job" if one.rank is None else f"rank {one.rank}"
                who += f" on {one.node}" if one.node and one.rank is not None else ""
                yield f"{plain(which + who)}: {one.error.removeprefix(f'{who}: ')}"
            return


def tracebacks(files: Files, rank: int | None) -> Iterator[str]:
    """The last traceback in each log."""
    for path, number in chosen(files, rank).items():
        lines = Tail(path).last(MOST)
        starts = [place for place, line in enumerate(lines) if TRACEBACK.match(line)]
        if starts:
            yield "\n".join([f"==> rank {number}: {path} <==", *traceback_from(lines[starts[-1] :])])


def traceback_from(lines: Sequence[str]) -> list[str]:
    """A traceback, to the line that names the exception."""
    prefix = TRACEBACK.match(lines[0])
    length = len(prefix[1] or "") if prefix else 0
    for end, line in enumerate(lines[1:], 1):
        if not line[length:].startswith(" "):
            return list(lines[: end + 1])
    return list(lines)


def stacks_of(files: Files, rank: int | None) -> Iterator[str]:
    """Where the ranks stood still."""
    for number, paths in stacks(files.run).items():
        for path in paths if rank in (None, number) else ():
            lines = Tail(path).last(MOST)
            if lines:
                yield "\n".join([f"==> rank {number}: {path} <==", *lines])
