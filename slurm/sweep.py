"""`dist-train sweep`: checks all points of a grid file, and queues those that are to run."""

from __future__ import annotations

import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_train.recipe import Recipe, load_recipe, write_recipe
from dist_train.resume import check_same, flat
from dist_train.run_directory import RunDirectory
from sharding.errors import UserError, UserErrors, collected
from slurm.array import Array, most_elements
from slurm.check_recipe import check_fit, check_memory, hardware_named
from slurm.freeze import freeze_code
from slurm.grid import Point, read_grid
from slurm.local import frozen
from slurm.record import Launch, LaunchRecord, Submission
from slurm.settings import LaunchSettings
from slurm.status import Files, gather
from slurm.submit import Cluster, at_work, check_where, gpu_types
from slurm.sweep_record import PoolProcess, Sweep, SweepRecord

NAMED = 3  # points named in a message
# Keys that change neither memory nor what a step takes: points that differ in these alone are planned once.
WITHOUT_WEIGHT = ("seed", "optimizer.learning_rate", "optimizer.weight_decay", "schedule.", "training.epochs")


@dataclass
class SweepRequest:
    """What is to be run.

    Attributes:
        overrides: of all points, beside those of the grid file.
        output: directory of the sweep; each point is a run directory in it.
        settings: of all points that do not ask otherwise.
        hardware: as for `Request`.
        parallel: on Slurm, runs of an array at once; on one machine, ranks at once. None: as many as there are.
        resume: run what is not finished of the sweep in `output`, and what the grid file has got since.
    """

    grid: Path
    overrides: Sequence[str]
    output: Path
    settings: LaunchSettings
    cluster: Cluster = "slurm"
    hardware: str | None = None
    parallel: int | None = None
    resume: bool = False


@dataclass
class Checked:
    """A point that can run."""

    point: Point
    recipe: Recipe
    settings: LaunchSettings


def submit_sweep(request: SweepRequest, say: Callable[[str], None], *, dry_run: bool = False) -> SweepRecord | None:
    """Checks a sweep and queues its points. Returns its record; None if `dry_run`, which prints what would be queued.

    Raises:
        UserError, UserErrors: something is wrong. Nothing was queued then, unless Slurm refuses one of several arrays.
    """
    record = SweepRecord(request.output)
    before = record.read().points if request.resume else []
    points = check(request, say)
    todo = choose(record, points, say) if request.resume else points
    if dry_run:
        show(request, record, todo)
        return None
    new = not record.directory.exists()
    if not request.resume and not new and any(record.directory.iterdir()):
        raise UserError(str(request.output), "exists already", "Give another --output, or continue it with --resume.")
    names = {one.point.name for one in points}
    sweep = Sweep(
        grid=str(request.grid.absolute()),
        cluster=request.cluster,
        settings=request.settings,
        points=[*(one.point for one in points), *(point for point in before if point.name not in names)],
        parallel=request.parallel,
    )
    try:
        queue(request, record, sweep, todo, say)
    except BaseException:
        if not request.resume and not any(record.run(one.point).submissions.exists() for one in todo):
            shutil.rmtree(record.path, ignore_errors=True)
            for one in todo:
                shutil.rmtree(record.directory / one.point.name, ignore_errors=True)
            if new:
                record.directory.rmdir()
        raise
    return record


def check(request: SweepRequest, say: Callable[[str], None]) -> list[Checked]:
    """Everything that can be known before, of all points.

    Raises:
        UserError, UserErrors: what is wrong; what several points share is told once.
    """
    path, points = read_grid(request.grid, request.overrides)
    settings = [point.settings(request.settings) for point in points]
    errors, notes = list[UserError](), dict[str, None]()
    for asked in {one.model_dump_json(): one for one in settings}.values():
        with collected(errors):
            notes |= dict.fromkeys(check_where(request.cluster, asked, request.output))
    errors = list({str(error): error for error in errors}.values())
    found: dict[str, tuple[UserError, list[str]]] = {}
    known: dict[str, Recipe | list[UserError]] = {}
    checked = []
    for point, asked in zip(points, settings, strict=True):
        wrong: list[UserError] = []
        with collected(wrong):
            checked.append(Checked(point, check_point(path, point, asked, known), asked))
        for error in wrong:
            found.setdefault(str(error), (error, []))[1].append(point.name)
    errors += [shared(error, names, len(points)) for error, names in found.values()]
    with collected(errors):
        check_hardware(request, checked, say)
    if errors:
        raise UserErrors(errors)
    for note in notes:
        say(f"Note: {note}")
    return checked


def check_point(
    path: Path, point: Point, settings: LaunchSettings, known: dict[str, Recipe | list[UserError]]
) -> Recipe:
    """A point's recipe.

    Args:
        known: what is known of a dataset and a number of ranks; it is not opened again for each point.

    Raises:
        UserError, UserErrors: it is wrong, or data and ranks do not fit.
    """
    recipe = load_recipe(path, point.overrides)
    inputs = (recipe.audio.input, recipe.text.input, recipe.simulation.rollout, recipe.training.accumulation)
    key = repr((recipe.data.model_dump_json(), *inputs, settings.nodes, settings.ranks))
    if key not in known:
        errors: list[UserError] = []
        with collected(errors):
            known[key] = check_fit(recipe, settings)
        known.setdefault(key, errors)
    fitted = known[key]
    if isinstance(fitted, list):
        raise UserErrors(fitted)
    return recipe.model_copy(update={"widths": fitted.widths})


def shared(error: UserError, names: list[str], count: int) -> UserError:
    """An error with the points that have it."""
    if len(names) == count:
        return error
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return UserError(error.where, f"{error.problem} (at {'; '.join(names[:NAMED])}{more})", error.remedy)


def check_hardware(request: SweepRequest, checked: Sequence[Checked], say: Callable[[str], None]) -> None:
    """Refuses points that do not fit the GPUs, if it is known which those are.

    Raises:
        UserErrors: each that does not fit.
    """
    hardware = hardware_named(request.hardware, gpu_types(request.settings) if request.cluster == "slurm" else ())
    if hardware is None:
        return
    errors: list[UserError] = []
    seen: set[str] = set()
    for one in checked:
        heavy = {k: v for k, v in flat(one.recipe.model_dump(mode="json")).items() if not k.startswith(WITHOUT_WEIGHT)}
        key = repr((heavy, one.settings.nodes, one.settings.ranks))
        if key not in seen:
            seen.add(key)
            alone: list[UserError] = []
            with collected(alone):
                say(f"Plan of {one.point.name}: {check_memory(one.recipe, one.settings, hardware)}.")
            errors += [shared(error, [one.point.name], len(checked)) for error in alone]
    if errors:
        raise UserErrors(errors)


def choose(record: SweepRecord, checked: Sequence[Checked], say: Callable[[str], None]) -> list[Checked]:
    """The points that are to run in a sweep that was submitted before: those not finished, and not at work.

    Raises:
        UserError: the process that starts the points still runs.
        UserErrors: points whose recipe has become another.
    """
    pool = record.read_pool()
    if pool is not None and pool.lives:
        remedy = f"Wait for it, or end it and its runs: kill {pool.process}."
        raise UserError(str(record.directory), f"is at work already (process {pool.process})", remedy)
    there = [one for one in checked if record.run(one.point).path.exists()]
    states = dict(zip((one.point.name for one in there), gather(map(Files, runs(record, there))), strict=True))
    todo, finished, live = [], [], []
    errors: list[UserError] = []
    for one in checked:
        name, run = one.point.name, RunDirectory(record.directory / one.point.name)
        changed = False
        if run.recipe.is_file() and run.saved:
            found: list[UserError] = []
            with collected(found):
                earlier = load_recipe(run.recipe)
                check_same(earlier, one.recipe)
                changed = earlier != one.recipe  # it may train on
            errors += [shared(error, [name], len(checked)) for error in found]
        if name in states and at_work(states[name]):
            live.append(name)
        elif name in states and states[name].state == "finished" and not changed:
            finished.append(name)
        else:
            todo.append(one)
    if errors:
        raise UserErrors(errors)
    if finished:
        say(f"Finished already: {len(finished)} of {len(checked)} points.")
    if live:
        say(f"At work already: {len(live)} points.")
    return todo


def runs(record: SweepRecord, checked: Iterable[Checked]) -> list[Path]:
    """Their run directories."""
    return [record.directory / one.point.name for one in checked]


def groups(todo: Sequence[Checked], most: int) -> list[list[Checked]]:
    """Points that one array can have: all its elements ask for the same.

    Args:
        most: elements an array may have.
    """
    alike: dict[str, list[Checked]] = {}
    for one in todo:
        alike.setdefault(one.settings.model_dump_json(), []).append(one)
    return [group[first : first + most] for group in alike.values() for first in range(0, len(group), most)]


def arrays(request: SweepRequest, record: SweepRecord, todo: Sequence[Checked], folder: Path) -> list[Array]:
    """The arrays of the points, in folders to be made in that one."""
    return [
        Array(
            folder=folder / f"array_{number}",
            code=folder / "code",
            runs=runs(record, group),
            settings=group[0].settings,
            name=f"dist-train:{request.output.name}",
            parallel=request.parallel,
        )
        for number, group in enumerate(groups(todo, most_elements()), 1)
    ]


def show(request: SweepRequest, record: SweepRecord, todo: Sequence[Checked]) -> None:
    """Prints what would be queued."""
    for one in todo:
        asked = f"{one.settings.nodes} × {one.settings.ranks}"
        print(f"# {one.point.name}  ({asked} ranks)  {shlex.join(one.point.overrides)}")
    if request.cluster == "slurm":
        for array in arrays(request, record, todo, record.path / "1"):
            print(array.script())


def queue(
    request: SweepRequest, record: SweepRecord, sweep: Sweep, todo: Sequence[Checked], say: Callable[[str], None]
) -> None:
    """Makes the run directories, and queues the points.

    Raises:
        UserError: Slurm refuses them.
    """
    folder = record.new_folder()
    shutil.copyfile(request.grid, folder / "grid.yaml")
    freeze_code(folder / "code", folder / "environment.json")
    for one in todo:
        # Runs that share a machine would each measure the others.
        settings = one.settings if request.cluster == "slurm" else one.settings.model_copy(update={"preflight": False})
        prepare(record.run(one.point), one.recipe, settings)
    record.write(sweep)
    command = shlex.join(["dist-train", *sys.argv[1:]])
    if not todo:
        say("Nothing is left to run.")
        return
    if request.cluster == "local":
        start_pool(record, folder / "code", [one.point.name for one in todo], command)
        return
    made = arrays(request, record, todo, folder)
    for array in made:
        say(array.prepare())
    for array in made:
        jobs = array.submit()
        for run, job in zip(array.runs, jobs, strict=True):
            LaunchRecord(run).add_submission(
                Submission(
                    cluster="slurm",
                    job=job,
                    submitted=time.time(),
                    host=platform.node(),
                    command=command,
                    settings=array.settings,
                )
            )
        at_once = f", {array.parallel} at once" if array.parallel and array.parallel < len(jobs) else ""
        asked = f"{array.settings.nodes} × {array.settings.ranks} ranks"
        count = f"{len(jobs)} points" if len(jobs) > 1 else "1 point"
        say(f"Job {jobs[0].partition('_')[0]}: {count} of {asked}{at_once}")


def prepare(run: LaunchRecord, recipe: Recipe, settings: LaunchSettings) -> None:
    """Writes what a job reads at its start."""
    if not run.run.exists():
        RunDirectory(run.run).create()
    run.path.mkdir(exist_ok=True)
    write_recipe(recipe, run.recipe)
    run.write_launch(Launch(settings=settings))
    run.cancelled.unlink(missing_ok=True)


def start_pool(record: SweepRecord, code: Path, points: list[str], command: str) -> None:
    """Starts the process that runs the points one after another, in a session of its own: Ctrl-C does not reach it."""
    with record.pool_log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "slurm.pool", str(record.directory)],
            env=frozen(code, {}),
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    record.write_pool(
        PoolProcess(host=platform.node(), process=str(process.pid), started=time.time(), points=points, command=command)
    )
