"""How the points of a sweep are: gathered, shown as a table, followed until all are over."""

from __future__ import annotations

import json
import shlex
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dist_train.run_directory import RunDirectory
from dist_train.task import MEASURES
from sharding.errors import plain
from sharding.launch import INTERRUPTED
from slurm.grid import Point
from slurm.status import Files, RunStatus, gather
from slurm.status_table import COLOURS, left, shown
from slurm.sweep_record import PoolProcess, Sweep, SweepRecord

REFRESH = 5.0  # seconds; more would burden a busy controller
FRAME = 8  # lines of the screen that are not rows of the table
REASONS = 5  # told below the table
NOT_STARTED = "not started"  # and nobody will
WAITING = "waiting"  # for room on this machine
ORDER = ("failed", "saving", "running", "starting", "requeued", "suspended", "pending", WAITING)  # what is shown first


@dataclass
class Seen:
    """A point.

    Attributes:
        state: of its run (`slurm.verdict.State`), or waiting, or not started.
        status: all that is known of its run; None if there is none.
        summary: of a finished run.
    """

    point: Point
    state: str
    why: str = ""
    status: RunStatus | None = None
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def restarts(self) -> int:
        """How often its run was started again."""
        return 0 if self.status is None else max(len(self.status.attempts) - 1, 0)

    @property
    def over(self) -> bool:
        """Nothing more will happen by itself."""
        return self.state == NOT_STARTED or (self.status is not None and self.status.over)


class Look:
    """Looks at the points of a sweep; those that are over only once.

    Args:
        record: of the sweep.
    """

    def __init__(self, record: SweepRecord) -> None:
        self.record = record
        self.sweep: Sweep = record.read()
        self.over: dict[str, Seen] = {}
        self.seen: list[Seen] = []  # at the last look of `follow`

    def __call__(self) -> list[Seen]:
        """All points, in order.

        Raises:
            UserError: a file is damaged.
        """
        pool = self.record.read_pool()
        awaited = set(pool.points) if pool is not None and pool.lives else set()
        there = [one for one in self.sweep.points if one.name not in self.over and self.record.run(one).recipe.exists()]
        found = dict(
            zip((one.name for one in there), gather(Files(self.record.run(one).run) for one in there), strict=True)
        )
        seen = []
        for point in self.sweep.points:
            waits = pool is not None and point.name in awaited and not self.begun(point, pool)
            one = self.over.get(point.name) or self.judge(point, found.get(point.name), waits)
            if one.over:
                self.over[point.name] = one
            seen.append(one)
        return seen

    def begun(self, point: Point, pool: PoolProcess) -> bool:
        """Whether the process that starts the runs has started this one."""
        submissions = self.record.run(point).read_submissions()
        return bool(submissions) and submissions[-1].submitted >= pool.started

    def judge(self, point: Point, status: RunStatus | None, waits: bool) -> Seen:
        """One point, of what is known of its run."""
        # A point without a job may have been run by hand.
        if waits or status is None or (status.job is None and not RunDirectory(status.run).recipe.is_file()):
            return Seen(point, WAITING if waits else NOT_STARTED, status=None if waits else status)
        seen = Seen(point, status.state, status.why, status)
        if status.state == "finished":
            try:
                seen.summary = json.loads(RunDirectory(status.run).summary.read_text())
            except (OSError, ValueError) as error:
                seen.why = f"summary.json cannot be read ({error})"
        return seen


def follow(look: Look, done: Callable[[Sequence[Seen]], None]) -> int:
    """Shows the table until all points are over, then calls `done`. Where there is no terminal, a line is printed when
    something has changed, and the table at the end. Returns the exit code: 0 if all have finished.
    """
    console, before = Console(), ""
    try:
        with Live(console=console, auto_refresh=False, vertical_overflow="visible", transient=True) as live:
            while True:
                seen = look.seen = look()
                if all(one.over for one in seen):
                    break
                if console.is_terminal:
                    live.update(screen(look, seen, max(console.height - FRAME, 3)), refresh=True)
                elif (now := counted(look, seen)) != before:
                    console.print(time.strftime("%H:%M:%S"), now, markup=False, highlight=False, soft_wrap=True)
                    before = now
                time.sleep(REFRESH)
    except KeyboardInterrupt:
        place = shlex.quote(str(look.record.directory))
        console.print(screen(look, look.seen))
        again = f"The points go on. Look again with: dist-train sweep --status {place} --watch"
        console.print(again, soft_wrap=True, markup=False, highlight=False)
        return INTERRUPTED
    console.print(screen(look, seen))
    done(seen)
    return 0 if all(one.state == "finished" for one in seen) else 1


def counted(look: Look, seen: Sequence[Seen]) -> str:
    """How many points are in which state."""
    counts = Counter(one.state for one in seen)
    states = [*ORDER, *sorted(set(counts) - set(ORDER))]
    told = ", ".join(f"{counts[state]} {state}" for state in states if counts[state])
    return plain(f"{look.record.directory.name}: {len(seen)} points, {told}")


def screen(look: Look, seen: Sequence[Seen], most: int | None = None) -> RenderableType:
    """What is shown of a sweep.

    Args:
        most: rows; those that finished, and those that have longest to wait, are left out first.
    """
    parts: list[RenderableType] = [Text(counted(look, seen), "bold")]
    rows = list(seen)
    if most is not None and len(rows) > most:
        rank = {state: number for number, state in enumerate(ORDER)}
        chosen = sorted(rows, key=lambda one: rank.get(one.state, len(rank)))[:most]
        rows = [one for one in rows if any(one is other for other in chosen)]
    parts.append(table(rows))
    if len(rows) < len(seen):
        parts.append(Text(f"… and {len(seen) - len(rows)} more", "dim"))
    bad = [one for one in seen if one.why and one.state in ("failed", "cancelled", "stopped", "unknown")]
    parts += [Text(plain(f"{one.point.name}: {one.why}"), COLOURS[one.state]) for one in bad[:REASONS]]
    if len(bad) > REASONS:
        parts.append(Text(f"… and {len(bad) - REASONS} more; sweep.parquet has all", "dim"))
    if bad or any(one.state == NOT_STARTED for one in seen):
        parts.append(Text("Run these again with the same command and --resume.", "dim"))
    return Group(*parts)


def made_of(status: RunStatus) -> str:
    """Steps made, of how many."""
    step, total = status.progress.step, status.progress.total_steps
    return "" if step is None else f"{step}/{total or '?'}"


def table(seen: Sequence[Seen]) -> Table:
    """A row for each point."""
    made = Table(box=None, pad_edge=False)
    split = "test" if any("test" in one.summary for one in seen) or not any(one.summary for one in seen) else "valid"
    again = any(one.restarts for one in seen)
    made.add_column("point", overflow="fold", min_width=16)
    known = [one.summary.get(split, {}).get("missing", {}) for one in seen]
    measure = MEASURES["classification" if any("macro_f1" in scores for scores in known) else "regression"]
    scored = (f"{split} {measure.title}", "missing flow")
    for column in ("state", "step", "clips/s", "left", *(["restarts"] if again else []), *scored):
        made.add_column(column, justify="left" if column == "state" else "right", no_wrap=True)
    for one in seen:
        status = one.status
        scores = [one.summary.get(split, {}).get(flow, {}).get(measure.main) for flow in ("complete", "missing")]
        made.add_row(
            Text(one.point.name),
            Text(one.state, f"bold {COLOURS.get(one.state, 'yellow')}"),
            made_of(status) if status is not None else "",
            shown(status.progress.clips_per_second, ".1f") if status is not None and not status.over else "",
            left(status) if status is not None else "",
            *([str(one.restarts)] if again else []),
            *(shown(score, ".3f") for score in scores),
        )
    return made
