"""The runs of a scaling experiment: found, read, and checked to be comparable."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.keys import flat, is_free
from dist_train.run_record import MARKS, Run, number, read_run
from dist_train.speed import WARM_UP
from sharding.errors import UserError, UserErrors

DEEPEST = 3  # levels of folders below the given one in which runs are looked for
MOST_RUNS = 1000
NAMED = 3  # runs that a note names
# What may differ between the runs: it decides how many clips a step takes, how long a run goes on, or what it learns,
# not what is computed for a clip.
FREE = (
    *("seed", "data.batch", "data.evaluation_batch", "data.budget", "data.budget.", "training.accumulation"),
    *("optimizer.learning_rate", "schedule.", "checkpoint.", "training.epochs", "training.patience"),
    *("training.validate_every", "training.select_on", "training.profile_step", "training.watchdog_seconds"),
    *("training.check_agreement_steps",),
)
NEEDED = ("step_seconds", "clips")


@dataclass
class Timed:
    """A run as far as scaling goes.

    Args:
        path: of its directory.
        world, nodes: ranks and nodes; nodes is None without plan.json.
        batch: clips of a step over all ranks.
        seed: of the recipe.
        steps: fields of the counted steps, [n] each: seconds, clips, tokens, mfu, exchange (seconds in collectives),
            unnamed (seconds of no phase), between (seconds of bookkeeping), micro_steps, opens (1 for the first step of
            an epoch). NaN where a step does not tell.
        left_out: steps that are not counted.
        plan: plan.json.
        recipe, environment: of the run.
    """

    path: Path
    world: int
    nodes: int | None
    batch: int
    seed: int
    steps: dict[str, np.ndarray]
    left_out: int
    plan: dict[str, Any]
    recipe: dict[str, Any]
    environment: dict[str, Any]


def find_runs(places: Sequence[Path]) -> list[Path]:
    """The run directories among these, and below those that are none.

    Raises:
        UserErrors: each place without a run.
    """
    found: dict[Path, None] = {}
    errors = []
    for place in places:
        runs = list(below(place, DEEPEST)) if place.is_dir() else []
        if not runs:
            problem = "holds no run directory" if place.is_dir() else "no such directory"
            errors.append(
                UserError(str(place), problem, "Give --output directories of training runs, or a folder of them.")
            )
        found.update({path.resolve(): None for path in runs})
    if len(found) > MOST_RUNS:
        errors.append(
            UserError("report --scaling", f"found {len(found)} runs, at most {MOST_RUNS} are read", "Give fewer.")
        )
    if errors:
        raise UserErrors(errors)
    return list(found)


def below(place: Path, depth: int) -> Iterator[Path]:
    """Run directories at or below a place; links to folders are not followed, hidden folders (of a sweep) left out."""
    if any((place / name).is_file() for name in MARKS):
        yield place
    elif depth:
        for entry in sorted(place.iterdir()):
            if entry.is_dir() and not entry.is_symlink() and not entry.name.startswith("."):
                yield from below(entry, depth - 1)


def read_runs(places: Sequence[Path]) -> tuple[list[Timed], list[str]]:
    """All runs that can be compared, and in words what was left out.

    Raises:
        UserErrors: there is none; or runs of different recipes or hardware are mixed: each key that differs.
    """
    runs: list[Timed] = []
    notes: list[str] = []
    problems: dict[str, list[str]] = {}
    lost: list[UserError] = []
    for path in find_runs(places):
        run = read_run(path)
        for problem in run.problems:
            problems.setdefault(problem, []).append(name_of(path))
        try:
            runs.append(timed(run, notes))
        except UserError as error:
            lost.append(error)
    if not runs:
        raise UserErrors(lost)
    notes += [f"{few(names)}: {problem}" for problem, names in problems.items()]
    notes += [f"{error.where} is left out: it {error.problem}." for error in lost]
    check_alike(runs)
    code = {(run.environment.get("git"), str(run.environment.get("packages"))) for run in runs}
    if len(code) > 1:
        notes.append("The runs were made with different code or packages (environment.json).")
    return runs, notes


def timed(run: Run, notes: list[str]) -> Timed:
    """What a run tells.

    Raises:
        UserError: it tells nothing that could be compared.
    """
    batch, name = number(get(run.recipe, "data", "batch")), name_of(run.path)
    remedy = "Give runs that have made some steps and whose files are whole."
    if not batch >= 1:
        raise UserError(name, "has no readable recipe.yaml with a data.batch", remedy)
    if not run.steps:
        raise UserError(name, "has logged no step", remedy)
    nodes, per_node = (number(run.plan.get(key)) for key in ("nodes", "per_node"))
    placed = min(nodes, per_node) >= 1 and nodes % 1 == per_node % 1 == 0
    worlds = [nodes * per_node if placed else math.nan, run.column("world_size")[-1]]
    worlds += [number(record.get("world_size")) for record in (run.summary, run.environment)]
    world = next((value for value in worlds if value >= 1), math.nan)
    if math.isnan(world):
        raise UserError(name, "tells nowhere how many ranks it had", remedy)
    keep = counted(run, world)
    if not keep.any():
        raise UserError(
            name, f"has no whole step on {world:.0f} ranks after the first {WARM_UP} and the measured one", remedy
        )
    others = int((np.nan_to_num(run.column("world_size"), nan=world) != world).sum())
    if others:
        notes.append(f"{name}: {others} steps were made on other than {world:.0f} ranks and are not counted.")
    if not placed:
        notes.append(f"{name}: without plan.json it has no prediction, and its nodes are not known.")
    phases = np.array(
        [
            sum(map(number, get(row, "phases").values())) if isinstance(get(row, "phases"), dict) else math.nan
            for row in run.steps
        ]
    )
    seconds, epoch = run.column("step_seconds"), run.column("epoch")
    columns = {
        "seconds": seconds,
        "clips": run.column("clips"),
        "tokens": run.column("tokens"),
        "mfu": run.column("mfu"),
        "exchange": run.column("exchange_seconds"),
        "unnamed": seconds - phases,
        "between": run.column("between_seconds"),
        "micro_steps": run.column("micro_steps"),
        "opens": (np.diff(epoch, prepend=math.nan) != 0).astype(float),
    }
    return Timed(
        path=run.path,
        world=int(world),
        nodes=int(nodes) if placed else None,
        batch=int(batch),
        seed=int(np.nan_to_num(number(run.recipe.get("seed")))),
        steps={key: values[keep] for key, values in columns.items()},
        left_out=int((~keep).sum()),
        plan=run.plan,
        recipe=run.recipe,
        environment=run.environment,
    )


def counted(run: Run, world: float) -> np.ndarray:
    """Which steps count, [n] bool: whole, made on so many ranks, not a process's first two, and neither the one that
    was measured for plan.json nor a profiled one.
    """
    keep = np.ones(len(run.steps), dtype=bool)
    for name in NEEDED:
        keep &= np.nan_to_num(run.column(name)) > 0
    keep &= np.nan_to_num(run.column("world_size"), nan=world) == world
    step, measured = run.column("step"), run.column("measured") > 0
    first = step[0] if step[0] == 1 else math.nan  # of a file whose beginning is lost, the first are no warm-up
    for start in (first, *(step[measured] - WARM_UP)):
        keep &= ~((step >= start) & (step < start + WARM_UP))
    return keep & ~measured & (step != number(get(run.recipe, "training", "profile_step")))


def check_alike(runs: Sequence[Timed]) -> None:
    """Refuses runs that cannot be compared.

    Raises:
        UserErrors: each key of the recipe that differs, or other hardware.
    """
    first, *others = runs
    errors: dict[str, UserError] = {}
    remedy = "Report runs of one recipe at a time; seed, batch, micro-steps and length of the training may differ."
    for run in others:
        old, new = flat(first.recipe), flat(run.recipe)
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key) and not is_free(key, FREE):
                problem = f"is {old.get(key)!r} in {name_of(first.path)} and {new.get(key)!r} in {name_of(run.path)}"
                errors.setdefault(key, UserError(key, problem, remedy))
        devices = [sorted(set(map(str, listed(one.environment.get("gpus"))))) for one in (first, run)]
        if devices[0] != devices[1]:
            told = [", ".join(names) or "no GPU" for names in devices]
            problem = f"are {told[0]} in {name_of(first.path)} and {told[1]} in {name_of(run.path)}"
            errors.setdefault("gpus", UserError("GPUs", problem, "Report runs on one kind of hardware at a time."))
    if errors:
        raise UserErrors(list(errors.values()))


def name_of(path: Path) -> str:
    """A run in words: in folders of points and seeds the last name alone would not tell."""
    return "/".join(path.parts[-2:])


def few(names: Sequence[str]) -> str:
    """Some of them."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def get(record: Any, *keys: str) -> Any:
    """A value in nested mappings; None where there is none."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record


def numbers(record: Any) -> dict[str, float]:
    """A mapping of names to finite numbers, empty if it is none."""
    pairs = record.items() if isinstance(record, dict) else ()
    return {str(name): found for name, value in pairs if math.isfinite(found := number(value))}


def listed(value: Any) -> list[Any]:
    """A list, empty if it is none."""
    return value if isinstance(value, list) else []
