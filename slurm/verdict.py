"""What state a run is in, from what Slurm says of its job and what its files tell."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from slurm.progress import SILENT, Progress, ago, lasting
from slurm.queue import JobState
from slurm.record import Attempt, Submission
from slurm.words import how_ended, why_waiting

State = Literal[
    "pending", "starting", "running", "saving", "requeued", "suspended",
    "finished", "stopped", "cancelled", "failed", "unknown",
]  # fmt: skip
OVER = ("finished", "stopped", "cancelled", "failed")
WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
SKEW = 5.0  # seconds by which clocks of nodes and file servers may differ


@dataclass
class Case:
    """All that the verdict is made of.

    Args:
        submission: the last one; None: a run by hand.
        job: what is known of its job.
        attempts: of that job, oldest first.
        cancelled: when `dist-train cancel` was called, seconds since the epoch; None: it was not.
        errors: what ranks reported in the last attempt, or in a run by hand.
    """

    submission: Submission | None
    job: JobState | None
    attempts: list[Attempt]
    progress: Progress
    cancelled: float | None
    now: float
    errors: list[str] = field(default_factory=list)

    @property
    def running(self) -> bool:
        """Slurm says that the job has its nodes."""
        return self.job is not None and self.job.live and self.job.state not in WAITING

    @property
    def current(self) -> Attempt | None:
        """The attempt of the job's present start; None while that has not told of itself."""
        last = self.attempts[-1] if self.attempts else None
        begun = None if self.job is None else moment(self.job.start)
        early = last is not None and begun is not None and last.started < begun - SKEW
        return last if self.running and not early else None

    @property
    def finished(self) -> bool:
        """The training came to its end since it was submitted."""
        last = self.attempts[-1] if self.attempts else None
        since = last.started if last else self.submission.submitted if self.submission else 0.0
        told = self.progress.finished is not None and self.progress.finished >= since - SKEW
        return told or (last is not None and last.outcome == "finished")

    @property
    def heard(self) -> bool:
        """The ranks of the last attempt were heard of just now."""
        since = self.attempts[-1].started if self.attempts else 0.0
        return self.progress.fresh(self.now) and (self.progress.heard or 0) >= since - SKEW


def moment(text: str) -> float | None:
    """A time as Slurm prints it, in seconds since the epoch; None for what is none."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        return None


def verdict(case: Case) -> tuple[State, str]:
    """The state, and why."""
    if case.submission is None:
        return by_hand(case)
    job = case.job
    assert job is not None
    if job.live:
        return waiting(case, job) if job.state in WAITING else live(case, job)
    return ended(case, job) if job.answered else unanswered(case, job)


def waiting(case: Case, job: JobState) -> tuple[State, str]:
    """The job is in the queue."""
    why = why_waiting(job.reason)
    if job.state in ("REQUEUE_HOLD", "SPECIAL_EXIT"):
        why = "Slurm holds it after a requeue: release it with scontrol release"
    if not case.attempts:
        return "pending", why
    before = told(case.attempts[-1])
    return "requeued", join(before, f"now it waits: {why}" if why else "now it waits")


def live(case: Case, job: JobState) -> tuple[State, str]:
    """The job has its nodes."""
    attempt = case.current
    if job.state in ("SUSPENDED", "STOPPED"):
        found: tuple[State, str] = "suspended", "Slurm has suspended the job"
    elif attempt is None and job.state == "COMPLETING" and case.attempts:
        found = "requeued", f"{told(case.attempts[-1])}; Slurm is ending the attempt"
    elif attempt is None:
        prepared = "its nodes are being prepared" if job.state == "CONFIGURING" else "its ranks start"
        found = "starting", prepared
    elif attempt.decision in ("stop", "done"):
        found = ended(case, job)
    elif attempt.outcome is not None:
        found = "requeued" if attempt.decision else "running", f"{told(attempt)}; Slurm is ending the attempt"
    elif job.state == "COMPLETING":
        found = "running", "Slurm is ending the attempt"
    else:
        found = by_phase(case)
    return found


def by_phase(case: Case) -> tuple[State, str]:
    """The ranks run."""
    progress = case.progress
    if not case.heard:
        silent = f"nothing was heard of the ranks for {lasting(case.now - progress.heard)}" if progress.heard else ""
        first = case.attempts[-1].first_step if case.attempts else 0
        stepped = progress.step is not None and progress.step > first
        return (
            ("running", silent if progress.watched else "")
            if stepped
            else ("starting", "its nodes are looked at, and its ranks load")
        )
    if progress.phase == "saving":
        return "saving", ""
    if progress.phase == "loading":
        return "starting", "its ranks load"
    behind = max(progress.places, key=lambda place: place.idle)
    if behind.idle > 60:
        return "running", f"rank {progress.places.index(behind)} began nothing new for {int(behind.idle)} s"
    return "running", ""


def ended(case: Case, job: JobState) -> tuple[State, str]:
    """The job is over, or its attempt is and nothing follows."""
    last = case.attempts[-1] if case.attempts else None
    how = how_ended(job.state, job.reason, job.exit_code)
    saved = f"saved at step {last.last_step}" if last is not None and last.outcome == "stopped" else ""
    gone = (
        f"it was to be requeued, but the job is over: {how}" if last is not None and last.decision == "requeue" else ""
    )
    if case.finished:
        return "finished", ""
    if case.cancelled is not None:
        return "cancelled", join(saved, f"by dist-train cancel, {ago(case.cancelled, case.now)}")
    if last is not None and last.decision == "stop":
        return "stopped" if saved else "failed", told(last)
    if job.state == "CANCELLED" or saved:
        before = "" if last else f"before it began{f' [{job.reason}]' if job.reason else ''}"
        return "cancelled" if job.state == "CANCELLED" else "stopped", join(saved, before or gone or how)
    told_none = "the attempt told no end" if last else "it ended before the training began"
    return "failed", join(
        *case.errors[:1], gone or (told(last) if last and last.outcome else told_none), "" if gone else how
    )


def join(*parts: str) -> str:
    """Parts of a sentence, those that are not empty."""
    return "; ".join(filter(None, parts))


def unanswered(case: Case, job: JobState) -> tuple[State, str]:
    """Slurm does not tell: what the files do."""
    last = case.attempts[-1] if case.attempts else None
    if case.finished or (last is not None and last.decision in ("stop", "done")):
        return ended(case, job)
    if last is not None and last.outcome is None and case.heard:
        return by_phase(case)
    if last is not None and last.decision == "requeue":
        return "requeued", told(last)
    if case.cancelled is not None:
        return "cancelled", f"by dist-train cancel, {ago(case.cancelled, case.now)}"
    if case.progress.heard and last is not None:
        return "unknown", f"the ranks were last heard of {ago(case.progress.heard, case.now)}"
    assert case.submission is not None
    return "unknown", f"it was submitted {ago(case.submission.submitted, case.now)}"


def by_hand(case: Case) -> tuple[State, str]:
    """A run of `dist-train train`, torchrun or srun."""
    progress = case.progress
    if progress.heard is None:
        return without_heartbeat(case)
    alive = [place.lives(progress.heard) for place in progress.places]
    dead = [rank for rank, lives in enumerate(alive) if lives is False]
    if case.heard and not dead:
        return by_phase(case)
    when = ago(progress.heard, case.now)
    if dead:
        died = "its processes are" if len(dead) == len(alive) else f"the process of rank {dead[0]} is"
        reported = case.errors[0] if case.errors else "it was killed, or memory ran out, or the machine restarted"
        return "failed", f"{died} gone since {when}: {reported}"
    host = progress.places[0].host if progress.places else "?"
    if None in alive or not alive:
        return "unknown", f"the ranks on {host} were last heard of {when}"
    return "suspended", f"its processes are there, but nothing was heard of them since {when}: they were stopped"


def without_heartbeat(case: Case) -> tuple[State, str]:
    """A run by hand that ended in order, or that has no watchdog."""
    progress = case.progress
    if progress.finished is not None and progress.finished >= (progress.logged or 0) - SKEW:
        return "finished", ""
    if case.errors:
        return "failed", case.errors[0]
    if progress.begun is not None and case.now - progress.begun < SILENT and progress.begun > (progress.logged or 0):
        return "starting", f"it began {ago(progress.begun, case.now)}, and no rank was heard of yet"
    pace = max(60.0, 5 * (progress.step_seconds or 0))
    if not progress.watched and progress.logged is not None and case.now - progress.logged < pace:
        return "running", f"as it seems: it has no watchdog, and logged a step {ago(progress.logged, case.now)}"
    if progress.step is None:
        return "stopped", "it ended before its first step"
    return "stopped", "it ended before it was finished"


def told(attempt: Attempt) -> str:
    """What an attempt told at its end."""
    cause = attempt.failures[0] if attempt.failures else None
    if cause is not None and cause.rank is not None and attempt.reason in ("", cause.error):
        who = f"rank {cause.rank} on {cause.node}" if cause.node else f"rank {cause.rank}"
        return f"{who}: {cause.error.removeprefix(f'{who}: ')}".rstrip(".")
    lost = "the attempt told no end, as when a node is lost"
    return (attempt.reason or (lost if attempt.outcome in (None, "lost") else attempt.outcome)).rstrip(".")
