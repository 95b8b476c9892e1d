"""`dist-train submit`: checks, freezes and queues a run, and says what comes next."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import submitit

from dist_train.recipe import Recipe
from dist_train.run_directory import RunDirectory
from sharding.errors import UserError
from slurm.check import check_cluster, check_place, node_groups
from slurm.check_recipe import check_memory, check_recipe, hardware_named
from slurm.executor import ours_win, script_of, slurm_executor, submit, test_only
from slurm.freeze import freeze
from slurm.job import TrainingJob
from slurm.local import LocalJob
from slurm.queue import job_state
from slurm.record import Launch, LaunchRecord, Submission
from slurm.settings import LaunchSettings

Cluster = Literal["slurm", "local"]
FOREVER = 60 * 24 * 365  # minutes: a local job has no time limit


@dataclass
class Request:
    """What is to be submitted.

    Attributes:
        recipe, overrides: as for `dist-train train`.
        output: the run directory.
        hardware: profile of the GPUs for the planner; None: that of the partition's GPUs, if known.
        resume: continue the run in `output`, with today's code.
    """

    recipe: Path
    overrides: Sequence[str]
    output: Path
    settings: LaunchSettings
    cluster: Cluster = "slurm"
    hardware: str | None = None
    resume: bool = False
    accept_other_base: bool = False


def submit_run(request: Request, say: Callable[[str], None], *, dry_run: bool = False) -> Submission | None:
    """Checks and submits a run. Returns what was submitted; None if `dry_run`, which prints the batch script.

    Raises:
        UserError, UserErrors: something is wrong; nothing was queued, and no run directory is left.
    """
    recipe = check(request, say)
    run = RunDirectory(request.output.absolute())
    record = LaunchRecord(run.path)
    if dry_run:
        if request.cluster == "slurm":
            executor = slurm_executor(record, request.settings, record.jobs / "1", name_of(request))
            print(script_of(executor))
        else:
            print(shlex.join([sys.executable, "-m", "slurm.job", str(run.path)]), f"# {request.settings.ranks} ranks")
        return None
    if request.resume:
        open_run(run)
    else:
        run.create()
    try:
        return queue(request, recipe, record, say)
    except BaseException:
        if not request.resume:
            record.discard()
            run.discard_unstarted()
        raise


def check(request: Request, say: Callable[[str], None]) -> Recipe:
    """Everything that can be known before.

    Raises:
        UserError, UserErrors: what is wrong.
    """
    settings = request.settings
    notes = []
    types: tuple[str, ...] = ()
    if request.cluster == "slurm":
        notes += check_cluster(settings)
        notes += check_place(request.output)
        if settings.partition:
            types = tuple(kind for group in node_groups(settings.partition) for kind in group.gpu_types)
    elif settings.node_counts != (1, 1):
        raise UserError("--nodes", f"is {settings.nodes}, and --cluster local is one machine", "Leave it out.")
    recipe = check_recipe(request.recipe, request.overrides, settings)
    hardware = hardware_named(request.hardware, types)
    if hardware is not None:
        say(f"Plan: {check_memory(recipe, settings, hardware)}.")
    elif settings.gpus_per_node and request.cluster == "slurm":
        notes.append("Whether the recipe fits the GPUs was not looked at: give --hardware (see dist-train plan).")
    for note in notes:
        say(f"Note: {note}")
    return recipe


def queue(request: Request, recipe: Recipe, record: LaunchRecord, say: Callable[[str], None]) -> Submission:
    """Freezes and queues a run that was checked.

    Raises:
        UserError: Slurm refuses it.
    """
    freeze(record, recipe)
    record.write_launch(Launch(settings=request.settings, accept_other_base=request.accept_other_base))
    record.cancelled.unlink(missing_ok=True)
    folder = record.new_folder()
    if request.cluster == "slurm":
        executor = slurm_executor(record, request.settings, folder, name_of(request))
        record.script.write_text(script_of(executor))
        ours_win(request.settings)
        say(test_only(record.script))
        job = submit(executor, TrainingJob(str(record.run)))
    else:
        local = submitit.LocalExecutor(folder)
        local.update_parameters(timeout_min=FOREVER)
        with with_variables(record, request.settings), without_terminal():
            job = submit(local, LocalJob(str(record.run)))
    submission = Submission(
        cluster=request.cluster,
        job=job.job_id,
        submitted=time.time(),
        host=platform.node(),
        command=shlex.join(["dist-train", *sys.argv[1:]]),
        settings=request.settings,
    )
    record.add_submission(submission)
    return submission


@contextmanager
def with_variables(record: LaunchRecord, settings: LaunchSettings) -> Iterator[None]:
    """The environment of local ranks, which a batch script would export: the frozen code goes first."""
    before = dict(os.environ)
    paths = [str(record.code), *filter(None, [settings.environment.get("PYTHONPATH", before.get("PYTHONPATH"))])]
    os.environ.update({**settings.environment, "PYTHONPATH": os.pathsep.join(paths)})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def without_terminal() -> Iterator[None]:
    """What is started inside inherits no terminal or pipe: whoever reads this command's output would wait for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in range(3)]
    nothing = os.open(os.devnull, os.O_RDWR)
    try:
        for number in range(3):
            os.dup2(nothing, number)
        yield
    finally:
        for number, copy in enumerate(kept):
            os.dup2(copy, number)
            os.close(copy)
        os.close(nothing)


def open_run(run: RunDirectory) -> None:
    """Checks that a run can be continued: it has begun, or was submitted and never came so far.

    Raises:
        UserError: there is none, or a job of it is not over.
    """
    for submission in LaunchRecord(run.path).read_submissions():
        if submission.cluster == "slurm" and job_state(submission.job).live:
            remedy = f"Wait for it, or end it with dist-train cancel {run.path}."
            raise UserError(str(run.path), f"is being trained by job {submission.job}", remedy)
    if not LaunchRecord(run.path).recipe.is_file():
        run.open()


def name_of(request: Request) -> str:
    """What squeue calls the job."""
    return f"dist-train:{request.output.name}"


def tell(submission: Submission, request: Request, say: Callable[[str], None]) -> None:
    """What was submitted, where its logs will be, what to do next."""
    place = shlex.quote(str(request.output))
    what = "Job" if submission.cluster == "slurm" else "Background process"
    say(f"{what} {submission.job} for {request.output}")
    say(f"  logs     {request.output / 'slurm' / 'jobs'}  (dist-train logs {place} --follow)")
    say(f"  state    dist-train status {place}")
    say(f"  stop     dist-train cancel {place}")
    say(f"  go on    dist-train submit {shlex.quote(str(request.recipe))} --output {place} … --resume")
