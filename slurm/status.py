"""What is known of runs, gathered from their files and from Slurm, without importing torch."""

from __future__ import annotations

import json
import platform
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from dist_train.run_directory import RunDirectory
from sharding.errors import UserError, plain
from sharding.files import MOST_YAML
from slurm.log_files import job_folder, job_logs, reports, run_logs
from slurm.progress import Progress, modified, process_lives, read, read_progress
from slurm.queue import JOB, JobState, job_states
from slurm.record import Attempt, Followed, LaunchRecord, Record, Submission, parse, rows
from slurm.verdict import OVER, Case, State, moment, verdict

ASK_SECONDS = 5.0  # given to squeue, and to sacct
MARKS = ("slurm", "recipe.yaml", "metrics.jsonl", "summary.json", "logs")  # one of them makes a run directory
FILES_TELL = ": shown is what the files tell."


class RankError(BaseModel):
    """What went wrong on a rank in the last attempt that failed."""

    rank: int | None
    node: str | None
    error: str
    log: Path | None


class Chained(BaseModel):
    """A job that follows."""

    command: str
    job: str
    state: str
    reason: str


class Advice(BaseModel):
    """A command to go on with."""

    command: str
    what: str


class RunStatus(BaseModel):
    """What `dist-train status` shows of a run; times are seconds since the epoch."""

    run: Path
    state: State
    why: str = ""
    cluster: Literal["slurm", "local"] | None = None
    """None: started by hand."""
    job: str | None = None
    slurm: JobState | None = None
    progress: Progress
    training_ends: float | None = None
    """At the pace of the last steps."""
    limit: float | None = None
    """End of the attempt's time limit."""
    saves: float | None = None
    """Before that, when it saves and is requeued; None where it will not be."""
    attempts: list[Attempt] = Field(default_factory=list)
    """Of all submissions, oldest first; one that never told its end and is over is "lost"."""
    errors: list[RankError] = Field(default_factory=list)
    chain: list[Chained] = Field(default_factory=list)
    logs: list[Path] = Field(default_factory=list)
    next: list[Advice] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)

    @property
    def over(self) -> bool:
        """Nothing more will happen by itself."""
        return self.state in OVER


class Files:
    """What lies in a run directory; what is damaged is left out and named in `notes`.

    Raises:
        UserError: it is no run directory.
    """

    def __init__(self, run: Path) -> None:
        try:
            found = [name for name in MARKS if (run / name).exists()]
            problem = None if found else f"is not a run directory (none of {', '.join(MARKS)} in it)"
            problem = problem if run.is_dir() else "is no directory"
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
        if problem is not None:
            remedy = "Give the --output of `dist-train submit` or `dist-train train`."
            if (run / ".sweep").is_dir():
                remedy = f"It holds a sweep: dist-train sweep --status {shlex.quote(str(run))}."
            raise UserError(str(run), problem, remedy)
        self.run, self.notes, self.record = run, [], LaunchRecord(run)  # type: tuple[Path, list[str], LaunchRecord]
        self.submissions = list(self.lines(Submission, self.record.submissions))
        attempts = {(one.job, one.restart): one for one in self.lines(Attempt, self.record.attempts)}
        self.attempts = list(attempts.values())
        self.cancelled = modified(self.record.cancelled)
        self.progress = read_progress(run, self.notes)

    def lines(self, kind: type[Record], path: Path) -> Iterator[Record]:
        """The lines of a file that are what they should be."""
        try:
            for row in rows(path):
                try:
                    yield parse(kind, row, path)
                except UserError as error:
                    self.notes.append(str(error))
        except UserError as error:
            self.notes.append(str(error))

    @property
    def submission(self) -> Submission | None:
        """The last one; None of a run by hand."""
        return self.submissions[-1] if self.submissions else None

    @property
    def last_attempt(self) -> Attempt | None:
        """Of the last submission's job; None if it told of none."""
        return next((one for one in reversed(self.attempts) if one.job == getattr(self.submission, "job", None)), None)

    @property
    def jobs(self) -> list[str]:
        """What Slurm is to be asked of."""
        last = self.submission
        if last is None or last.cluster == "local":
            return []
        return [last.job, *(link.job for link in last.chain)]


def gather(runs: Iterable[Files]) -> list[RunStatus]:
    """The status of each run, Slurm asked once for all."""
    every = list(runs)
    jobs = [job for files in every for job in files.jobs]
    states = job_states(jobs, ASK_SECONDS) if jobs else {}
    return [status_of(files, states) for files in every]


def status_of(files: Files, states: dict[str, JobState], now: float | None = None) -> RunStatus:
    """The status of one run.

    Args:
        states: what Slurm says of its jobs.
    """
    now = time.time() if now is None else now
    last, progress = files.submission, files.progress
    job = None if last is None else states[last.job] if last.cluster == "slurm" else local_state(last)
    mine = [attempt for attempt in files.attempts if last is not None and attempt.job == last.job]
    errors = rank_errors(files, mine)
    case = Case(last, job, mine, progress, files.cancelled, now, [one.error for one in errors])
    state, why = verdict(case)
    attempts = [closed(one, case) for one in files.attempts]
    found = RunStatus(run=files.run, state=state, why=plain(why), progress=progress, attempts=attempts)
    found.notes = notes = files.notes.copy()
    if state in ("pending", "starting", "running", "saving", "finished") and not any(one.failures for one in mine[-1:]):
        errors = []
    found.errors = errors
    if last is not None and job is not None:
        found.cluster, found.job, found.slurm = last.cluster, last.job, job
        found.chain = chained(files, last, states, job)
        if not job.answered:
            asked = f"Slurm tells nothing of job {last.job[:30]} ({job.reason})"
            notes.append(plain(asked if last.cluster == "slurm" else f"The job {job.reason}") + FILES_TELL)
        if case.running and job.state != "COMPLETING" and last.cluster == "slurm":
            found.limit = moment(job.end)
            if found.limit is not None and files.cancelled is None:
                found.saves = found.limit - last.settings.signal_seconds
        if files.cancelled is not None and job.live:
            notes.append("It was cancelled: it saves and ends, and is not requeued.")
    if state in ("running", "saving") and progress.seconds_left is not None and progress.logged is not None:
        found.training_ends = max(progress.logged + progress.seconds_left, now)
    found.logs = log_places(files)
    found.next = list(advice(found, last))
    return found


def chained(files: Files, last: Submission, states: dict[str, JobState], job: JobState) -> list[Chained]:
    """The commands that follow. On one machine the run's own process carries them out, and writes it down."""
    told = {(one.job, one.command): one.state for one in files.lines(Followed, files.record.chain)}
    found = []
    for link in last.chain:
        state = states.get(link.job) if last.cluster == "slurm" else None
        if state is None:
            begun = told.get((link.job, link.command), "PENDING" if job.live else "CANCELLED")
            state = JobState(begun if job.live or begun != "RUNNING" else "FAILED")
        found.append(Chained(command=link.command, job=link.job, state=state.state, reason=state.reason))
    return found


def local_state(submission: Submission) -> JobState:
    """Whether the process that controls a job on one machine runs."""
    if submission.host != platform.node():
        return JobState("UNKNOWN", f"runs on {plain(submission.host)}, if at all", answered=False)
    lives = process_lives(submission.job, submission.submitted)
    return JobState("RUNNING" if lives else "ENDED", nodes=submission.host)


def closed(attempt: Attempt, case: Case) -> Attempt:
    """An attempt that never told its end and cannot any more is lost."""
    if attempt.outcome is not None or attempt is case.current:
        return attempt
    if case.job is not None and not case.job.answered and case.attempts and attempt is case.attempts[-1]:
        return attempt
    return attempt.model_copy(update={"outcome": "lost"})


def rank_errors(files: Files, attempts: list[Attempt]) -> list[RankError]:
    """Of the last attempt, or of a run by hand: what is known to have failed first, then what else ranks reported."""
    if not attempts:
        logs = run_logs(files.run)
        place = files.run / "logs"
        return [one for rank in reports(place) for one in reported(place, rank, None, logs.get(rank))]
    last = attempts[-1]
    if not JOB.fullmatch(last.job):
        return []
    logs, place = job_logs(files.record, last.job, last), files.record.reports(last.job, last.restart)
    found = [
        RankError(
            rank=failure.rank,
            node=failure.node or node_of(last, failure.rank),
            error=plain(failure.error),
            log=next(iter(logs.get(failure.rank if failure.rank is not None else 0, [])), None),
        )
        for failure in last.failures
    ]
    known = {one.rank for one in found}
    for rank in reports(place):
        if rank not in known:
            found += reported(place, rank, node_of(last, rank), logs.get(rank))
    return found


def reported(folder: Path, rank: int, node: str | None, logs: Sequence[Path] | None) -> Iterator[RankError]:
    """What a rank left for the launcher."""
    text = read(folder / f"rank_{rank}.error.json", MOST_YAML, [])
    try:
        found = json.loads(text or "[]")
        errors = [str(UserError(*map(str, row))) for row in found]
    except (ValueError, TypeError, RecursionError):
        errors = ["its report is damaged"]
    for error in errors:
        yield RankError(rank=rank, node=node, error=error, log=next(iter(logs or []), None))


def node_of(attempt: Attempt, rank: int | None) -> str | None:
    """The node of a rank: every node has as many, in order."""
    if rank is None or not attempt.nodes or not 0 <= rank < attempt.ranks:
        return None
    return attempt.nodes[rank * len(attempt.nodes) // attempt.ranks]


def log_places(files: Files) -> list[Path]:
    """The folder of the last job's output, and of stacks and heartbeats if there is one."""
    last = files.submission
    own = None if last is None else job_folder(files.record, last.job)
    return [place for place in (own, files.run / "logs") if place is not None and place.is_dir()]


def advice(status: RunStatus, last: Submission | None) -> Iterator[Advice]:
    """What to do next, as commands."""

    def ours(*words: str) -> str:
        return shlex.join(["dist-train", *words])

    run = str(status.run)
    if status.state == "finished":
        yield Advice(command=ours("report", run), what="figures of the run on one page")
        yield Advice(command=ours("evaluate", run), what="predictions and scores of the best checkpoint")
    elif status.over:
        if status.state == "failed":
            yield Advice(command=ours("logs", run, "--errors"), what="what every rank reported")
        yield Advice(command=resume(status, last), what="goes on from the last checkpoint")
    elif last is not None:
        if status.state != "pending":
            yield Advice(command=ours("logs", run, "--follow"), what="what it prints")
        yield Advice(command=ours("cancel", run), what="saves and ends it")
    elif status.progress.places and status.progress.places[0].lives(status.progress.heard or 0):
        pid = status.progress.places[0].process.rpartition(":")[2]
        yield Advice(command=f"kill -TERM {pid}", what="saves and ends it")
    elif status.state != "starting":
        yield Advice(command=resume(status, None), what="goes on from the last checkpoint, if it has ended")


def resume(status: RunStatus, last: Submission | None) -> str:
    """The command that goes on with a run."""
    if last is not None:
        command = plain(last.command)
        return command if "--resume" in command.split() else f"{command} --resume"
    run = RunDirectory(status.run)
    made: Any = None
    with suppress(ValueError, TypeError, LookupError, RecursionError):
        made = json.loads(read(run.environment, MOST_YAML, []) or "")["world_size"]
    ranks = ["--ranks", str(made)] if isinstance(made, int) and 1 < made < 1 << 31 else []
    return shlex.join(["dist-train", "train", str(run.recipe), "--output", str(run.path), *ranks, "--resume"])
