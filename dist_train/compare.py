"""Runs side by side: mean and deviation over seeds, and whether a difference is more than luck of the clips."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel

from dist_train.keys import flat
from dist_train.label_order import LabelOrder, by_label
from dist_train.names import FLOWS
from dist_train.run_record import LEAVE_OUT, SPLITS, Run, are_places, classes_of, number, read_run
from sharding.errors import UserError, UserErrors
from sharding.files import MOST_JSON, read_bounded

RESAMPLES = 10_000
CHUNK = 500  # resamples at once: 500 × clips numbers in memory
NOT_COMPARED = ("seed", "training.watchdog_seconds", "training.profile_step", "checkpoint.")


class FlowScore(BaseModel):
    """One flow of a setting.

    Attributes:
        mean: of the metric over seeds; by_seed: each; deviation: between seeds (n - 1), None of one seed.
        difference: of the metric to the first setting, over the clips that both have; interval: its 95 % interval; p:
            of no difference, two-sided. Paired bootstrap over clips, what counts of a clip averaged over seeds. None
            for the first setting.
        macro_f1: of classifiers, each seed's.
    """

    mean: float
    by_seed: list[float]
    deviation: float | None
    difference: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None
    macro_f1: list[float] = []


class Setting(BaseModel):
    """Runs that differ in their seed alone.

    Attributes:
        changes: keys of the recipe in which this setting differs from the first, with its values.
        floor: the metric of the constant answer (`metrics.task_floors`), if all runs agree on it.
        label_order: how well the similarity of representations follows the label (`label_order.LabelOrder`), of each
            run that has representations of the split.
    """

    name: str
    runs: list[str]
    seeds: list[int | None]
    changes: dict[str, str]
    clips: int
    floor: float | None
    flows: dict[str, FlowScore]
    label_order: list[LabelOrder] = []


class Comparison(BaseModel):
    """Settings in the order in which they were given; the first is what the others are compared with."""

    split: str
    metric: Literal["mae", "accuracy"]
    settings: list[Setting]
    resamples: int = RESAMPLES


class Scored:
    """A run and its predictions on a split, by key.

    Raises:
        UserError: it has none.
    """

    def __init__(self, run: Run, split: str) -> None:
        self.run, self.split = run, split
        self.recipe = flat(run.recipe)
        self.classes, rows = read_predictions(run.path, split)
        self.rows = dict(rows)
        self.floor = number(((run.summary.get(split) or {}).get("floor") or {}).get(self.metric))

    @property
    def metric(self) -> Literal["mae", "accuracy"]:
        """What is compared."""
        return "accuracy" if self.classes else "mae"

    def counts(self, keys: Iterable[str], place: int) -> np.ndarray:
        """[n] what counts of each clip: absolute error of a number, 1 of a class that is right and 0 of a wrong one.

        Args:
            place: of the flow in the rows.
        """
        rows = np.array([self.rows[key] for key in keys])
        if self.classes:
            return (rows[:, place] == rows[:, 0]).astype(np.float64)
        return np.abs(rows[:, place] - rows[:, 0])

    @property
    def order(self) -> LabelOrder | None:
        """How well the similarity of representations of this split follows the label."""
        found = self.run.representations
        if found is None or found.split != self.split:
            return None
        return by_label(found.complete, found.missing, found.label, nominal=bool(self.classes))

    @property
    def compared(self) -> dict[str, object]:
        """The recipe, but for what does not make a setting."""
        return {key: value for key, value in self.recipe.items() if not key.startswith(NOT_COMPARED)}


def read_predictions(path: Path, split: str) -> tuple[list[str], list[tuple[str, np.ndarray]]]:
    """Names of the classes, none of numbers; and of each clip key, and label and prediction of both flows [3].

    Raises:
        UserError: the file is not there, or has a row that is not finite.
    """
    place = path / f"predictions_{split}.csv"
    remedy = f"Run dist-train evaluate {path} --split {split}."
    try:
        table = csv.DictReader(
            io.StringIO(read_bounded(place, MOST_JSON, LEAVE_OUT).decode(errors="replace"), newline="")
        )
        classes, rows = classes_of(table.fieldnames or ()), []
        for row in table:
            values = np.array([number(row.get(name)) for name in ("label", *FLOWS)])
            usable = are_places(values.tolist(), classes) if classes else np.isfinite(values).all()
            if not usable or not row.get("key"):
                raise UserError(str(place), f"is damaged at {row.get('key') or 'a row without key'}", remedy)
            rows.append((row["key"], values))
        return classes, rows
    except (OSError, csv.Error):
        raise UserError(str(place), "cannot be read", remedy) from None


def compare(directories: Sequence[Path]) -> Comparison:
    """Compares runs on the test split, or on the validation split if one of them has no test predictions.

    Raises:
        UserErrors: runs without predictions, or of other clips or labels.
    """
    runs = [read_run(directory) for directory in directories]
    split = next(
        (name for name in SPLITS if all((run.path / f"predictions_{name}.csv").is_file() for run in runs)), SPLITS[0]
    )
    scored, errors = [], []
    for run in runs:
        try:
            scored.append(Scored(run, split))
        except UserError as error:
            errors.append(error)
    errors += mismatches(scored)
    if errors:
        raise UserErrors(errors)
    groups: list[list[Scored]] = []
    for one in scored:
        same = next((group for group in groups if group[0].compared == one.compared), None)
        if same is None:
            groups.append([one])
        else:
            same.append(one)
    rng = np.random.default_rng(0)
    return Comparison(
        split=split, metric=scored[0].metric, settings=[setting(group, groups[0], rng) for group in groups]
    )


def mismatches(scored: Sequence[Scored]) -> Iterator[UserError]:
    """Runs that cannot be compared with the first."""
    for other in scored[1:]:
        common = scored[0].rows.keys() & other.rows.keys()
        first, here = (sorted(common)[:1], str(other.run.path))
        if other.classes != scored[0].classes:
            told = [
                f"has the classes {', '.join(one.classes)}" if one.classes else "predicts numbers"
                for one in (other, scored[0])
            ]
            problem = f"{told[0]}, {scored[0].run.path} {told[1]}"
            yield UserError(here, problem, "Compare runs of one task: their numbers mean the same.")
        elif not common:
            yield UserError(here, f"has no clip in common with {scored[0].run.path}", "Compare runs on the same data.")
        elif any(abs(scored[0].rows[key][0] - other.rows[key][0]) > 1e-5 for key in common):
            yield UserError(
                here, f"has other labels than {scored[0].run.path}, e.g. {first[0]}", "Compare runs on the same data."
            )


def setting(group: Sequence[Scored], reference: Sequence[Scored], rng: np.random.Generator) -> Setting:
    """A group of runs, compared with the reference."""
    changes = {
        key: str(value)
        for key, value in group[0].compared.items()
        if value != reference[0].compared.get(key) and key in reference[0].compared.keys() | group[0].compared.keys()
    }
    floors = {round(one.floor, 6) for one in group if np.isfinite(one.floor)}
    flows = {}
    for place, flow in enumerate(FLOWS, start=1):
        by_seed = [float(one.counts(one.rows, place).mean()) for one in group]
        score = FlowScore(
            mean=float(np.mean(by_seed)),
            by_seed=by_seed,
            deviation=float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else None,
            macro_f1=[macro_f1(one, place) for one in group if one.classes],
        )
        if group is not reference:
            keys = sorted(set.intersection(*(set(one.rows) for one in (*group, *reference))))
            differences = mean_counts(group, keys, place) - mean_counts(reference, keys, place)
            score.difference = float(differences.mean())
            score.interval, score.p = paired_bootstrap(differences, rng)
        flows[flow] = score
    return Setting(
        name=name_of([one.run.path for one in group]),
        runs=[str(one.run.path) for one in group],
        seeds=[seed if isinstance(seed := one.recipe.get("seed"), int) else None for one in group],
        changes=changes,
        clips=min(len(one.rows) for one in group),
        floor=floors.pop() if len(floors) == 1 else None,
        flows=flows,
        label_order=[order for one in group if (order := one.order) is not None],
    )


def macro_f1(one: Scored, place: int) -> float:
    """Of a classifier's flow, over all its clips."""
    from dist_train.metrics import class_metrics  # noqa: PLC0415  needs torch, which a comparison of numbers does not

    rows = np.array(list(one.rows.values()))
    return float(class_metrics(rows[:, place], rows[:, 0], len(one.classes))["macro_f1"] or 0.0)


def mean_counts(group: Sequence[Scored], keys: Sequence[str], place: int) -> np.ndarray:
    """[n] what counts of each clip, mean over the runs."""
    return np.mean([one.counts(keys, place) for one in group], axis=0)


def paired_bootstrap(differences: np.ndarray, rng: np.random.Generator) -> tuple[tuple[float, float], float]:
    """95 % percentile interval of the mean, and the two-sided share of resamples beyond 0.

    Args:
        differences: [n], one per clip.
    """
    count = len(differences)
    means = np.concatenate(
        [
            rng.multinomial(count, np.full(count, 1 / count), size=CHUNK) @ differences / count
            for _ in range(RESAMPLES // CHUNK)
        ]
    )
    low, high = np.percentile(means, (2.5, 97.5))
    beyond = 2 * min((means <= 0).mean(), (means >= 0).mean())
    return (float(low), float(high)), float(min(1.0, max(beyond, 1 / RESAMPLES)))


def name_of(paths: Sequence[Path]) -> str:
    """What the names of the runs begin with alike, without the seed."""
    names = [path.resolve().name for path in paths]
    alike = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))
    start = "".join(column[0] for column in alike) if len(names) > 1 else names[0]
    return start.removesuffix("seed=").rstrip(",=_-. ") or names[0]
