"""The status of runs on the terminal: one screen for one run, a line each for several."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sharding.errors import UserError, UserErrors, plain
from sharding.launch import INTERRUPTED
from slurm.progress import ago, lasting
from slurm.record import Attempt
from slurm.status import Files, RankError, RunStatus, gather
from slurm.words import how_ended, why_waiting

REFRESH = 5.0  # seconds; more would burden a busy controller
SHOWN = 8  # attempts, and errors; --json has all
LONGEST = 160  # letters of what followed an attempt
FEW = 4  # nodes that are all named
COLOURS = {
    **dict.fromkeys(("running", "saving", "finished"), "green"),
    **dict.fromkeys(("pending", "starting", "requeued", "suspended", "stopped", "cancelled", "unknown"), "yellow"),
    "failed": "red",
}


def show(runs: Sequence[Path], *, as_json: bool, watch: bool) -> int:
    """`dist-train status`. Returns the exit code.

    Raises:
        UserError: what is given is no run directory, or options do not go together.
    """
    if as_json and watch:
        raise UserError("--watch", "shows a screen, and --json prints data", "Give one of them.")
    if as_json:
        print(TypeAdapter(list[RunStatus]).dump_json(gather(map(Files, runs)), indent=1).decode())
        return 0
    if watch:
        return follow(runs)
    console = Console()
    found, errors = look(runs)
    for part in screen(found):
        console.print(part, soft_wrap=isinstance(part, Text))  # commands and paths are to be copied
    if errors:
        raise UserErrors(errors)
    return 0


def look(runs: Sequence[Path]) -> tuple[list[RunStatus], list[UserError]]:
    """The status of those that are run directories, and what is wrong with the others."""
    every: list[Files] = []
    errors: list[UserError] = []
    for run in runs:
        try:
            every.append(Files(run))
        except UserError as error:
            errors.append(error)
    return gather(every), errors


def follow(runs: Sequence[Path], *, sleep: Callable[[float], Any] = time.sleep) -> int:
    """Refreshes the screen until all runs are over or Ctrl-C is pressed."""
    console = Console()
    try:
        with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
            while True:
                found = gather(map(Files, runs))
                live.update(Group(*screen(found)), refresh=True)
                if all(status.over for status in found):
                    return 0
                sleep(REFRESH)
    except KeyboardInterrupt:
        return INTERRUPTED


def screen(found: Sequence[RunStatus]) -> list[RenderableType]:
    """What is shown, from top to bottom."""
    return one(found[0]) if len(found) == 1 else several(found) if found else []


def several(found: Sequence[RunStatus]) -> list[RenderableType]:
    """A line for each run."""
    table = Table(box=None, pad_edge=False)
    for column in ("run", "job", "state", "step", "loss", "clips/s", "left", "restarts"):
        table.add_column(column, justify="left" if column in ("run", "state") else "right", overflow="fold")
    for status in found:
        progress = status.progress
        table.add_row(
            Text(plain(str(status.run))),
            Text(plain(status.job or "–")),
            coloured(status.state),
            f"{progress.step}/{progress.total_steps or '?'}" if progress.step is not None else "",
            shown(progress.loss, ".3f"),
            shown(progress.clips_per_second, ".1f") if not status.over else "",
            left(status),
            str(max(len(status.attempts) - 1, 0)) if status.cluster else "",
        )
    whys = [Text(f"{plain(str(one.run))}: {one.why}") for one in found if one.why and one.state != "running"]
    notes = dict.fromkeys(note for status in found for note in status.notes)
    return [table, *whys, *(Text(f"Note: {note}", "yellow") for note in notes)]


def one(status: RunStatus) -> list[RenderableType]:
    """All about one run."""
    head = Text.assemble(plain(str(status.run)), "  ", coloured(status.state.upper()))
    if status.job is not None:
        where = f" on {status.slurm.nodes}" if status.slurm and status.slurm.nodes else ""
        head.append(plain(f"  {'local job' if status.cluster == 'local' else 'job'} {status.job}{where}"))
    parts: list[RenderableType] = [head]
    if status.why:
        parts.append(Text(status.why[0].upper() + status.why[1:] + "."))
    parts += [Text(f"Note: {note}", "yellow") for note in status.notes]
    facts = Table.grid(padding=(0, 2))
    for name, value in rows(status):
        facts.add_row(Text(name, "dim"), value)
    if facts.row_count:
        parts.append(facts)
    if status.attempts:
        parts += [Text(), history(status.attempts)]
    if status.errors:
        parts += [Text(), Text("Errors of the last attempt" if status.job else "Errors", "bold"), *told(status.errors)]
    if status.chain:
        parts += [Text(), Text("Then", "bold")]
        parts += [Text(f"  {plain(f'{link.command}  (job {link.job}): {words(link.state, link.reason)}')}")
                  for link in status.chain]  # fmt: skip
    if status.logs:
        parts += [Text(), Text("Logs", "bold"), *(Text(f"  {plain(str(place))}") for place in status.logs)]
    if status.next:
        parts += [Text(), Text("Next", "bold")]
    parts += [Text.assemble("  ", (advice.command, "cyan"), (f"   # {advice.what}", "dim")) for advice in status.next]
    return parts


def rows(status: RunStatus) -> Iterable[tuple[str, RenderableType]]:
    """The facts of one run that are known."""
    progress = status.progress
    if status.state == "pending" and status.slurm and status.slurm.start:
        yield "starts", f"{clock(status.slurm.start)}, as Slurm expects"
    if progress.step is not None:
        phase = f", phase {plain(progress.phase)}" if progress.phase and status.state in ("running", "starting") else ""
        epoch = f", epoch {progress.epoch} of {progress.epochs or '?'}" if progress.epoch else ""
        yield "step", Text(f"{steps(status)}{epoch}{phase}")
        if progress.total_steps:
            yield "", ProgressBar(total=progress.total_steps, completed=progress.step, width=40)
    pace = [f"loss {progress.loss:.4g}" if progress.loss is not None else ""]
    if not status.over:
        pace += [
            f"{progress.clips_per_second:.3g} clips/s" if progress.clips_per_second else "",
            f"{progress.step_seconds:.3g} s a step" if progress.step_seconds else "",
        ]
    if any(pace):
        yield "pace", Text(", ".join(filter(None, pace)))
    if status.training_ends is not None:
        yield "trained", Text(f"in {left(status)}, about {clock(status.training_ends)}")
    if status.limit is not None:
        yield "time limit", Text(limit(status))
    if progress.saved_step is not None:
        when = f", {ago(progress.saved)}" if progress.saved else ""
        yield "saved", Text(f"step {progress.saved_step}{when}")


def limit(status: RunStatus) -> str:
    """When the attempt's time is over, and what happens then."""
    end, saves = status.limit, status.saves
    assert end is not None
    text = f"{clock(end)}, in {lasting(max(end - time.time(), 0))}"
    if status.training_ends is not None and status.training_ends < (saves or end):
        return text
    return text if saves is None else f"{text}: about {clock(saves)} it saves, is requeued and goes on"


def history(attempts: Sequence[Attempt]) -> Table:
    """Every start, and how it ended."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("attempt", "started", "nodes", "ranks", "steps", "ended as", "then"):
        table.add_column(column, justify="right" if column in ("ranks", "steps") else "left", overflow="fold")
    if len(attempts) > SHOWN:
        table.add_row("…", f"{len(attempts) - SHOWN} earlier")
    for attempt in attempts[-SHOWN:]:
        made = "" if attempt.last_step is None else f"{attempt.first_step}–{attempt.last_step}"
        reason = "" if attempt.reason == attempt.outcome else attempt.reason
        then = ": ".join(filter(None, (attempt.decision, reason)))
        if attempt.excluded:
            then += f" (without {', '.join(attempt.excluded)})"
        table.add_row(
            Text(plain(f"{attempt.job}.{attempt.restart}")),
            clock(attempt.started),
            Text(plain(some(attempt.nodes))),
            str(attempt.ranks),
            made or f"{attempt.first_step}–",
            Text(attempt.outcome or "running", "red" if attempt.outcome in ("failed", "lost", "hung") else ""),
            Text(plain(then if len(then) <= LONGEST else f"{then[:LONGEST]}…")),
        )
    return table


def some(names: Sequence[str]) -> str:
    """Names, of many the first and the last."""
    return ", ".join(names) if len(names) <= FEW else f"{names[0]}, {names[1]}, … {names[-1]} ({len(names)})"


def told(errors: Sequence[RankError]) -> Iterable[Text]:
    """Errors, those that several ranks share once."""
    shared: dict[str, list[RankError]] = {}
    for error in errors:
        own = f"rank {error.rank} on {error.node}: "  # as ranks begin their reports
        shared.setdefault(error.error.removeprefix(own), []).append(error)
    for text, same in list(shared.items())[:SHOWN]:
        ranks = [str(one.rank) for one in same if one.rank is not None]
        nodes = dict.fromkeys(one.node for one in same if one.node)
        who = f"rank{'s' if len(ranks) > 1 else ''} {spans(ranks)}" if ranks else "" if nodes else "the job"
        who += f"{' on ' if who else ''}{some(list(nodes))}" if nodes else ""
        yield Text(f"  {plain(who)}: {text}", "red")
        log = next((one.log for one in same if one.log), None)
        if log is not None:
            yield Text(f"    {plain(str(log))}", "dim")
    if len(shared) > SHOWN:
        yield Text(f"  … and {len(shared) - SHOWN} more")


def spans(ranks: Sequence[str]) -> str:
    """0–3, 7 of 0 1 2 3 7."""
    parts: list[list[int]] = []
    for rank in sorted(map(int, ranks)):
        if parts and rank == parts[-1][-1] + 1:
            parts[-1][1:] = [rank]
        else:
            parts.append([rank])
    return ", ".join("–".join(map(str, part)) for part in parts)


def words(state: str, reason: str) -> str:
    """The state of a job that follows."""
    if state == "PENDING":
        return f"pending, {why_waiting(reason)}" if reason else "pending"
    return state.lower() if state in ("RUNNING", "COMPLETING", "CONFIGURING") else how_ended(state, reason, None)


def steps(status: RunStatus) -> str:
    """Steps made, of how many."""
    progress = status.progress
    if progress.step is None:
        return ""
    share = f" ({100 * progress.step / progress.total_steps:.0f} %)" if progress.total_steps else ""
    return f"{progress.step} of {progress.total_steps or '?'}{share}"


def left(status: RunStatus) -> str:
    """Until the training ends."""
    return "" if status.training_ends is None else lasting(max(status.training_ends - time.time(), 0))


def shown(value: float | None, form: str) -> str:
    """A number that may be unknown."""
    return "" if value is None else f"{value:{form}}"


def coloured(state: str) -> Text:
    """A state."""
    return Text(state, f"bold {COLOURS[state.lower()]}")


def clock(when: float | str) -> str:
    """A time of day, with the date if it is not today's."""
    try:
        found = datetime.fromisoformat(when) if isinstance(when, str) else datetime.fromtimestamp(when)
    except (ValueError, OverflowError, OSError):
        return "?"
    return found.strftime("%H:%M" if found.date() == datetime.now().date() else "%Y-%m-%d %H:%M")
