"""What happens after an attempt: the run is done, goes on, or is given up with the reason. Looks at records alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

from slurm.record import Attempt
from slurm.settings import LaunchSettings

FAILURES = ("failed", "hung", "lost", "bad nodes")
BLAMED = 2  # failures in a row that begin on the same node, after which the run does without it
STUCK = 3  # attempts in a row that were stopped before they made a step


class Decision(NamedTuple):
    """What to do, why, and which nodes to do without from now on (all of them, not only new ones)."""

    action: Literal["requeue", "stop", "done"]
    reason: str
    excluded: list[str]


def decide(attempts: Sequence[Attempt], settings: LaunchSettings, *, cancelled: bool) -> Decision:
    """Judges the last attempt, which has ended, by those before it.

    Args:
        attempts: of this submission, oldest first. "lost" ones were requeued by Slurm itself.
        cancelled: the user does not want it to go on.
    """
    last = attempts[-1]
    excluded = sorted({node for attempt in attempts for node in attempt.excluded} | set(to_exclude(attempts)))
    cause = cause_of(last)
    if last.outcome == "finished":
        return Decision("done", "finished", excluded)
    if last.outcome == "refused":
        return Decision("stop", f"would fail again: {cause}", excluded)
    if cancelled:
        return Decision("stop", "cancelled", excluded)
    if last.outcome == "stopped":
        recent = attempts[-STUCK:]
        idle = [attempt.outcome == "stopped" and attempt.last_step == attempt.first_step for attempt in recent]
        if len(recent) == STUCK and all(idle):
            why = f"{STUCK} attempts in a row were stopped before they made a step: allow more time"
            return Decision("stop", why, excluded)
        return Decision("requeue", f"stopped on request and saved at step {last.last_step}", excluded)
    reason = hopeless(attempts, settings)
    return Decision("requeue" if reason is None else "stop", reason or cause, excluded)


def hopeless(attempts: Sequence[Attempt], settings: LaunchSettings) -> str | None:
    """Why a run that failed is given up; None: it is tried again."""
    last = attempts[-1]
    failures = [attempt for attempt in attempts if attempt.outcome in FAILURES]
    same = 0
    for attempt in reversed(failures):
        if attempt.last_step != last.last_step or signature(attempt) != signature(last):
            break
        same += 1
    if same >= settings.same_failures:
        return f"{same} attempts ended at step {last.last_step} in the same way: {cause_of(last)}"
    if len(failures) > settings.max_restarts:
        return f"{len(failures)} failures (max_restarts {settings.max_restarts}): {cause_of(last)}"
    return None


def cause_of(attempt: Attempt) -> str:
    """What went wrong first."""
    return attempt.failures[0].error if attempt.failures else "no error was told"


def signature(attempt: Attempt) -> str:
    """Equal for errors that differ in numbers, addresses and nodes alone."""
    first = attempt.failures[0].error if attempt.failures else ""
    for node in attempt.nodes:
        first = first.replace(node, "NODE")
    return f"{attempt.outcome}: {re.sub(r'0x[0-9a-f]+|[0-9]+', '#', first)}"


def to_exclude(attempts: Sequence[Attempt]) -> list[str]:
    """Nodes that the last attempt shows to be bad: named by preflight, or blamed `BLAMED` times in a row."""
    last = attempts[-1]
    named = [failure.node for failure in last.failures if failure.node is not None]
    if last.outcome == "bad nodes":
        return named
    recent = [attempt for attempt in attempts if attempt.outcome in ("failed", "hung")][-BLAMED:]
    if len(recent) < BLAMED or last.outcome not in ("failed", "hung"):
        return []
    blamed = Counter(attempt.failures[0].node for attempt in recent if attempt.failures)
    # On a single node everything begins there.
    several = all(len(attempt.nodes) > 1 for attempt in recent)
    return [node for node, times in blamed.items() if node is not None and times == BLAMED and several]
