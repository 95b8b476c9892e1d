"""`dist-train submit`: checks, freezes and queues a run, and says what comes next."""

from __future__ import annotations

import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from submitit.slurm.slurm import SlurmExecutor

from dist_train.build import open_split
from dist_train.recipe import Recipe
from dist_train.run_directory import RunDirectory
from sharding.errors import UserError, UserErrors, collected
from slurm.ask import ask
from slurm.chain import Link, check_chain, executor_of, read_chain, submit_chain
from slurm.check import check_cluster, check_place, node_groups
from slurm.check_recipe import check_memory, check_recipe, hardware_named
from slurm.executor import ours_win, script_of, slurm_executor, submit, test_only
from slurm.freeze import freeze
from slurm.job import TrainingJob
from slurm.local import start_local, visible_gpus
from slurm.probe import probe
from slurm.record import ChainLink, Launch, LaunchRecord, Submission
from slurm.settings import LaunchSettings
from slurm.status import Files, RunStatus, gather

Cluster = Literal["slurm", "local"]
LIVE = ("pending", "starting", "running", "saving", "requeued", "suspended")  # states of a run with a job


@dataclass
class Request:
    """What is to be submitted.

    Attributes:
        recipe, overrides: as for `dist-train train`.
        output: the run directory.
        hardware: profile of the GPUs for the planner; None: that of the partition's GPUs, if known.
        resume: continue the run in `output`, with today's code.
        then: commands that follow the run, e.g. "evaluate --split valid".
    """

    recipe: Path
    overrides: Sequence[str]
    output: Path
    settings: LaunchSettings
    cluster: Cluster = "slurm"
    hardware: str | None = None
    resume: bool = False
    accept_other_base: bool = False
    then: Sequence[str] = ()

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.output.absolute()


def submit_run(request: Request, say: Callable[[str], None], *, dry_run: bool = False) -> Submission | None:
    """Checks and submits a run. Returns what was submitted; None if `dry_run`, which prints the batch script.

    Raises:
        UserError, UserErrors: something is wrong; nothing was queued, and no run directory is left.
    """
    recipe, links = check(request, say)
    run = RunDirectory(request.run)
    record = LaunchRecord(run.path)
    if dry_run:
        show(request, record, links)
        return None
    if request.resume:
        open_run(run)
    else:
        run.create()
    try:
        return queue(request, recipe, record, links, say)
    except BaseException:
        if not request.resume:
            record.discard()
            run.discard_unstarted()
        raise


def cluster_named(name: str) -> Cluster:
    """What `--cluster` names.

    Raises:
        UserError: nothing known.
    """
    if name not in ("slurm", "local"):
        raise UserError("--cluster", f"is {name!r}", "Write slurm or local.")
    return "slurm" if name == "slurm" else "local"


def check(request: Request, say: Callable[[str], None]) -> tuple[Recipe, list[Link]]:
    """Everything that can be known before. Returns the recipe, and the commands that follow.

    Raises:
        UserErrors: all that is wrong.
    """
    settings, errors, notes = request.settings, list[UserError](), list[str]()
    hardware = recipe = None
    with collected(errors):
        notes += check_where(request.cluster, settings, request.output)
    links = read_chain(request.then, request.run, errors)
    with collected(errors):
        recipe = check_recipe(request.recipe, request.overrides, settings)
        check_splits(links, recipe)
    with collected(errors):
        hardware = hardware_named(request.hardware, gpu_types(settings) if request.cluster == "slurm" else ())
    if errors or recipe is None:
        raise UserErrors(errors)
    if hardware is not None:
        say(f"Plan: {check_memory(recipe, settings, hardware)}.")
    elif settings.gpus_per_node and request.cluster == "slurm":
        notes.append("Whether the recipe fits the GPUs was not looked at: give --hardware (see dist-train plan).")
    for note in notes:
        say(f"Note: {note}")
    return recipe, links


def check_where(cluster: Cluster, settings: LaunchSettings, output: Path) -> list[str]:
    """Looks at the cluster, or this machine, and at the place for the output. Returns notes.

    Raises:
        UserError, UserErrors: what is not there.
    """
    if cluster == "local":
        check_local(settings)
        return []
    errors, notes = list[UserError](), list[str]()
    with collected(errors):
        notes += check_cluster(settings)
    with collected(errors):
        notes += check_place(output)
    if errors:
        raise UserErrors(errors)
    return notes


def gpu_types(settings: LaunchSettings) -> tuple[str, ...]:
    """What Slurm calls the GPUs of the partition, the cluster's default one if none is named."""
    name = settings.partition or probe().default_partition
    return tuple(kind for group in node_groups(name) for kind in group.gpu_types) if name else ()


def check_local(settings: LaunchSettings) -> None:
    """Refuses what one machine does not have.

    Raises:
        UserError: nodes or GPUs.
    """
    if settings.node_counts != (1, 1):
        raise UserError("--nodes", f"is {settings.nodes}, and --cluster local is one machine", "Leave it out.")
    gpus = len(visible_gpus())
    if gpus and settings.gpus_per_node > gpus:
        remedy = f"Give {gpus} or less; see CUDA_VISIBLE_DEVICES."
        raise UserError("--gpus-per-node", f"is {settings.gpus_per_node}, and this process sees {gpus}", remedy)


def check_splits(links: Sequence[Link], recipe: Recipe) -> None:
    """Refuses to evaluate on a split that the run's dataset does not have.

    Raises:
        UserError: it is asked for.
    """
    for link in links:
        if link.words[0] == "evaluate":
            try:
                open_split(recipe, link.params["split"])
            except UserError as error:
                where = f"--then {shlex.join(link.words)!r}"
                raise UserError(where, f"{error.where} {error.problem}", error.remedy) from None


def show(request: Request, record: LaunchRecord, links: Sequence[Link]) -> None:
    """Prints what would be run."""
    settings, folder = request.settings, record.jobs / "1"
    if request.cluster == "local":
        print(shlex.join([sys.executable, "-m", "slurm.job", str(record.run)]), f"# {settings.ranks} ranks")
        for link in links:
            print(link.command)
        return
    print(script_of(training_executor(request, record, folder)))
    for link in links:
        print(script_of(executor_of(link, record, settings, folder, name_of(request))))


def training_executor(request: Request, record: LaunchRecord, folder: Path) -> SlurmExecutor:
    """The executor for the run."""
    run = shlex.quote(str(record.run))
    return slurm_executor(record.code, run, request.settings, folder, name_of(request))


def queue(
    request: Request, recipe: Recipe, record: LaunchRecord, links: Sequence[Link], say: Callable[[str], None]
) -> Submission:
    """Freezes and queues a run that was checked.

    Raises:
        UserError: Slurm refuses it.
    """
    freeze(record, recipe)
    launch = Launch(settings=request.settings, accept_other_base=request.accept_other_base)
    if request.cluster == "local":
        launch.chain = [list(link.words) for link in links]
    record.write_launch(launch)
    record.cancelled.unlink(missing_ok=True)
    folder, name = record.new_folder(), name_of(request)
    chain: list[ChainLink] = []
    if request.cluster == "slurm":
        executor = training_executor(request, record, folder)
        record.script.write_text(script_of(executor))
        ours_win(request.settings)
        say(test_only(record.script))
        check_chain(links, record, request.settings, folder, name)
        job = submit(executor, TrainingJob(str(record.run))).job_id
        try:
            chain = submit_chain(links, record, request.settings, folder, name, job)
        except BaseException:
            ask(["scancel", job], 20.0)  # with it Slurm cancels those that wait for it
            raise
    else:
        job = start_local(record, folder)
        chain = [ChainLink(command=link.command, job=job) for link in links]
    submission = Submission(
        cluster=request.cluster,
        job=job,
        submitted=time.time(),
        host=platform.node(),
        command=shlex.join(["dist-train", *sys.argv[1:]]),
        settings=request.settings,
        chain=chain,
    )
    record.add_submission(submission)
    return submission


def open_run(run: RunDirectory) -> None:
    """Checks that a run can be continued: it has begun, or was submitted and never came so far, and has no job now.

    Raises:
        UserError: there is none, or two jobs would write to it.
    """
    if not LaunchRecord(run.path).recipe.is_file():
        run.open()
    found = gather([Files(run.path)])[0]
    if at_work(found):
        who = f"job {found.job}" if found.job else "a process"
        remedy = "See dist-train status; dist-train cancel has it save and end."
        raise UserError(str(run.path), f"is at work already ({who} is {found.state})", remedy)


def at_work(status: RunStatus) -> bool:
    """Whether its job is alive, or it was started by hand and its ranks are heard of."""
    return status.state in LIVE and (status.job is not None or status.state != "starting")


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
    for link in submission.chain:
        say(f"  then     {link.command}" + (f"  (job {link.job})" if submission.cluster == "slurm" else ""))
    if submission.chain:
        say(
            "Each starts when the one before it has succeeded, however often the run is requeued until then. If one "
            "fails, those after it are cancelled: mend that, and type them as above."
        )
