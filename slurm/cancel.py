"""Cancels a submitted run so that nothing is lost: it is marked first, so that nobody requeues it, saves, and ends."""

from __future__ import annotations

import getpass
import platform
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import psutil
from rich.console import Console

from sharding.errors import UserError, plain
from sharding.launch import INTERRUPTED
from slurm.ask import ask
from slurm.progress import ago, lasting, process_lives, read_progress
from slurm.queue import GONE, JOB, JobState, job_states
from slurm.record import LaunchRecord, Submission
from slurm.status import ASK_SECONDS, Files, gather, resume, status_of
from slurm.verdict import WAITING

POLL = 2.0  # seconds between questions to Slurm
ENDING = 30.0  # seconds for Slurm to end what was cancelled
MARKED = "The run is marked as cancelled, so it is not requeued; "


def cancel(run: Path, *, now: bool) -> int:
    """`dist-train cancel`. Returns the exit code.

    Args:
        now: without saving.

    Raises:
        UserError: no submitted run, its record is damaged, or Slurm does not take the order.
    """
    files = Files(run)
    submissions = LaunchRecord(run).read_submissions()
    if not submissions:
        found = gather([files])[0]
        how = next((one.command for one in found.next if one.command.startswith("kill")), "Ctrl-C where it runs")
        raise UserError(str(run), "was not submitted, but started by hand", f"Stop it by {how}: it saves and ends.")
    last = submissions[-1]
    jobs = [job for one in submissions for job in own(one)]
    wrong = [job for job in jobs if not JOB.fullmatch(job)]
    if wrong:
        problem = f"names {wrong[0][:30]!r}, which is no job id"
        raise UserError(str(files.record.submissions), problem, "Remove the line.")
    states = job_states(jobs, ASK_SECONDS) if jobs else {}
    before = status_of(files, states)
    live = [job for job in jobs if states[job].live or not states[job].answered]
    console = Console(stderr=True, highlight=False)
    if before.over and not live:
        console.print(f"{run} is over already: {before.state}. There is nothing to cancel.", markup=False)
        return 0
    mark(files.record)
    main = own(last)[:1]
    stop([job for job in live if job not in main])  # what follows first, that it does not start in between
    try:
        if last.cluster == "local":
            end_local(last, console, now=now)
        else:
            end_job(files, main[0], states[main[0]], last, console, now=now)
    except KeyboardInterrupt:
        console.print(f"It goes on saving. {MARKED}`dist-train cancel --now` ends it at once.", soft_wrap=True)
        return INTERRUPTED
    tell(run, last)
    return 0


def own(submission: Submission) -> list[str]:
    """The Slurm jobs of a submission: its own, and those that follow."""
    return [submission.job, *(link.job for link in submission.chain)] if submission.cluster == "slurm" else []


def mark(record: LaunchRecord) -> None:
    """Says that the run is not to be requeued.

    Raises:
        UserError: the disk refuses.
    """
    when = datetime.now().astimezone().isoformat(timespec="seconds")
    temporary = record.cancelled.with_name("cancelled.new")
    try:
        temporary.unlink(missing_ok=True)  # whatever it is: a foreign directory may have put a FIFO or a link there
        temporary.write_text(f"{when} {getpass.getuser()}@{platform.node()}\n")
        temporary.replace(record.cancelled)
    except OSError as error:
        raise UserError(
            str(record.cancelled), f"cannot be written ({error.strerror}), and without it the run may be requeued",
            "Free space or permissions; or use scancel, and again if it comes back.",
        ) from None  # fmt: skip


def stop(jobs: list[str], *options: str) -> None:
    """scancel; what is gone already is left.

    Raises:
        UserError: Slurm does not take it.
    """
    for job in jobs:  # one by one: a job that is gone must not hide what Slurm says of another
        done, text = ask(["scancel", *options, job], ASK_SECONDS * 2)
        if not done and not any(word in text for word in GONE) and "already" not in text:
            raise UserError(
                f"job {job}",
                f"cannot be cancelled from here (scancel: {text})",
                f"{MARKED}try again where Slurm answers.",
            )


def end_job(files: Files, job: str, state: JobState, last: Submission, console: Console, *, now: bool) -> None:
    """Ends a Slurm job; one that trains is asked to save, and given time for it."""
    attempts = [one for one in files.attempts if one.job == job]
    trains = state.live and state.state not in WAITING and attempts and attempts[-1].ended is None
    if trains and not now:
        stop([job], "--signal=USR2")
        limit = last.settings.signal_seconds
        console.print(f"Asked job {job} to save and end; waiting up to {lasting(limit)} (--now: not at all).")
        wait(files.run, console, limit, lambda: not running(job_states([job], ASK_SECONDS)[job]))
    stop([job])
    wait(files.run, console, ENDING, lambda: not job_states([job], ASK_SECONDS)[job].live)


def running(state: JobState) -> bool:
    """It has nodes, or nobody knows."""
    return not state.answered or (state.live and state.state not in WAITING)


def end_local(last: Submission, console: Console, *, now: bool) -> None:
    """Ends a job on one machine.

    Raises:
        UserError: it runs on another one.
    """
    if last.host != platform.node():
        remedy = f"{MARKED}run this on {plain(last.host)}."
        raise UserError(f"job {plain(last.job)}", f"runs on {plain(last.host)}", remedy)
    limit = last.settings.signal_seconds
    cancel_local(last, now=now)
    if not now:
        console.print(f"Asked process {last.job} to save and end; waiting up to {lasting(limit)} (--now: not at all).")
        wait(None, console, limit, lambda: not lives(last))
        cancel_local(last, now=True)
    wait(None, console, ENDING, lambda: not lives(last))


def lives(submission: Submission) -> bool:
    """Whether a local job's process runs."""
    return process_lives(submission.job, submission.submitted)


def cancel_local(submission: Submission, *, now: bool) -> None:
    """Has submitit's controller of a job on this machine pass SIGTERM on to the ranks, which save; or kills all."""
    if not lives(submission):
        return
    try:
        controller = psutil.Process(int(submission.job))
        if not now:
            controller.terminate()
            return
        for process in (controller, *controller.children(recursive=True)):
            process.kill()
    except psutil.Error:  # it ended meanwhile
        return


def wait(run: Path | None, console: Console, seconds: float, over: Callable[[], bool]) -> None:
    """Waits until it is over, `seconds` at most; shows on a terminal how far the run is."""
    deadline = time.monotonic() + seconds
    with console.status("waiting") as shown:
        while not over() and time.monotonic() < deadline:
            progress = None if run is None else read_progress(run, [])
            where = f"step {progress.step}, phase {progress.phase}" if progress and progress.phase else "waiting"
            shown.update(f"{where} ({lasting(max(deadline - time.monotonic(), 0))} left)")
            time.sleep(POLL)


def tell(run: Path, last: Submission) -> None:
    """What was saved last, and how to go on."""
    after = gather([Files(run)])[0]
    console = Console(highlight=False)
    progress = after.progress
    if not after.over:
        console.print(f"{run}: {after.state}, Slurm is still ending it.", markup=False, soft_wrap=True)
    elif after.state == "finished":
        console.print(f"{run} had finished.", markup=False, soft_wrap=True)
        return
    else:
        console.print(f"{run} is cancelled.", markup=False, soft_wrap=True)
    when = f", {ago(progress.saved)}" if progress.saved else ""
    saved = (
        f"Saved last: step {progress.saved_step}{when}." if progress.saved_step is not None else "Nothing was saved."
    )
    console.print(saved, markup=False, soft_wrap=True)
    console.print(f"Go on with: {resume(after, last)}", markup=False, soft_wrap=True)
