"""How a training scales over ranks: what runs of several world sizes measured, beside what the planner foretold them.

Weak scaling: as many clips per rank in every world; strong scaling: the same global batch. Which one runs show follows
from their batches and ranks. In both, efficiency is clips per second and rank, as a share of the smallest world's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from dist_train.interval import RUNS, Estimate, ratio
from dist_train.scaling_runs import Timed, get, listed, numbers, read_runs
from sharding.errors import plain
from sharding.hardware import ring_bytes

OPENING = 0.05  # share of the time in first steps of epochs from which it is told
SPREAD = 0.02  # relative difference of bytes on the wire from which it is told


class Figure(BaseModel):
    """A measured number and its 95 % interval, without one where too few steps tell."""

    model_config = ConfigDict(extra="forbid")

    value: float
    low: float | None = None
    high: float | None = None


class Foretold(BaseModel):
    """What the planner foretold for the recipe on this world, of a typical step (plan.json)."""

    model_config = ConfigDict(extra="forbid")

    hardware: str
    step_seconds: float
    clips_per_second: float = Field(description="Clips of a whole step over its seconds.")
    exchange_share: float = Field(description="Seconds of exchange over those of the step; ZeRO-3 hides part of them.")


class Wire(BaseModel):
    """Bytes of one step of rank 0, measured and foretold for the very clips of that step; means over the runs."""

    model_config = ConfigDict(extra="forbid")

    given: float = Field(description="Whole tensors given to collectives.")
    foretold_given: float
    sent: float = Field(description="Of these, sent by a rank on a ring over all ranks.")
    foretold_sent: float


class Point(BaseModel):
    """Runs of one world size, number of nodes and batch."""

    model_config = ConfigDict(extra="forbid")

    ranks: int
    nodes: int | None = Field(description="null: not known (no plan.json).")
    batch: int = Field(description="Clips of a step over all ranks.")
    runs: list[str] = Field(description="Directories.")
    seeds: list[int]
    steps: int = Field(description="Counted.")
    left_out: int = Field(description="Steps that are not counted: warm-up, measured, profiled, damaged.")
    micro_steps: float = Field(description="Per step.")
    step_seconds: Figure
    clips_per_second: Figure
    tokens_per_second: Figure | None
    mfu: Figure | None
    exchange_share: Figure | None = Field(description="Share of the step that rank 0 spends in collectives.")
    waiting_share: float | None = Field(description="Of that time, the share it waits for ranks that come later.")
    unnamed_seconds: float | None = Field(description="Of a step, in no phase.")
    between_seconds: float | None = Field(description="Bookkeeping between two steps.")
    opening_share: float = Field(description="Share of the time in first steps of epochs, where loading begins.")
    wire: Wire | None
    foretold: Foretold | None


class Entry(BaseModel):
    """A point in a series."""

    model_config = ConfigDict(extra="forbid")

    point: int = Field(description="Index in `points`.")
    efficiency: Figure = Field(description="Of the series' first point; that of the first is 1.")
    foretold_efficiency: float | None


class Series(BaseModel):
    """Points that belong together, from the smallest world on."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["weak", "strong"]
    clips: float = Field(description="weak: per rank and step; strong: per step over all ranks.")
    entries: list[Entry]


class Scaling(BaseModel):
    """What `dist-train report --scaling` writes to scaling.json."""

    model_config = ConfigDict(extra="forbid")

    hardware: str = Field(description="GPUs of the first run, or CPU.")
    points: list[Point]
    series: list[Series]
    notes: list[str]


def measure_scaling(places: Sequence[Path]) -> Scaling:
    """Everything that the runs in these places show.

    Raises:
        UserErrors: no run can be read, or runs that cannot be compared are mixed.
    """
    runs, notes = read_runs(places)
    groups: dict[tuple[int, int, int], list[Timed]] = {}
    for run in sorted(runs, key=lambda run: (run.world, run.nodes or 0, run.batch, run.seed, run.path)):
        groups.setdefault((run.world, run.nodes or 0, run.batch), []).append(run)
    points = [point_of(group) for group in groups.values()]
    rates = [rate(group) for group in groups.values()]
    series = list(series_of(points, rates))
    return Scaling(
        hardware=plain(", ".join(dict.fromkeys(map(str, listed(runs[0].environment.get("gpus")))))) or "CPU",
        points=points,
        series=series,
        notes=[*map(plain, notes), *remarks(points, series)],
    )


def rate(runs: Sequence[Timed]) -> Estimate:
    """Clips per second."""
    return ratio([(run.steps["clips"], run.steps["seconds"]) for run in runs])


def point_of(runs: Sequence[Timed]) -> Point:
    """What runs of one world size measured."""
    first = runs[0]
    seconds = np.concatenate([run.steps["seconds"] for run in runs])
    opens = np.concatenate([run.steps["opens"] for run in runs])
    ones = [(run.steps["seconds"], np.ones_like(run.steps["seconds"])) for run in runs]
    mfu = [run.steps["mfu"] * run.steps["seconds"] for run in runs]
    return Point(
        ranks=first.world,
        nodes=first.nodes,
        batch=first.batch,
        runs=[str(run.path) for run in runs],
        seeds=[run.seed for run in runs],
        steps=len(seconds),
        left_out=sum(run.left_out for run in runs),
        micro_steps=mean(np.concatenate([run.steps["micro_steps"] for run in runs])) or 1.0,
        step_seconds=figure(ratio(ones)),
        clips_per_second=figure(rate(runs)),
        tokens_per_second=per_second(runs, [run.steps["tokens"] for run in runs]),
        mfu=per_second(runs, mfu),
        exchange_share=per_second(runs, [run.steps["exchange"] for run in runs]),
        waiting_share=waiting(runs),
        unnamed_seconds=mean(np.concatenate([run.steps["unnamed"] for run in runs])),
        between_seconds=mean(np.concatenate([run.steps["between"] for run in runs])),
        opening_share=float(seconds[opens > 0].sum() / seconds.sum()),
        wire=wire_of(runs),
        foretold=foretold(first),
    )


def figure(estimate: Estimate) -> Figure:
    """For the record."""
    low, high = estimate.bounds or (None, None)
    return Figure(value=estimate.value, low=low, high=high)


def per_second(runs: Sequence[Timed], amounts: Sequence[np.ndarray]) -> Figure | None:
    """Amounts of the steps [n], one array per run, over their seconds; over the steps that tell. None if none does."""
    parts = []
    for run, amount in zip(runs, amounts, strict=True):
        known = np.isfinite(amount) & (amount >= 0)
        parts.append((amount[known], run.steps["seconds"][known]))
    if not sum(float(amount.sum()) for amount, _ in parts) > 0:
        return None
    return figure(ratio([part for part in parts if len(part[0])]))


def mean(values: np.ndarray) -> float | None:
    """Of the finite ones."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def waiting(runs: Sequence[Timed]) -> float | None:
    """Share of the time in collectives that was waiting, in the steps in which it was looked at; None on one rank."""
    if runs[0].world == 1:
        return None
    whole = transfer = 0.0
    for run in runs:
        found = numbers(get(run.plan, "measured"))
        spent, moved = found.get("exchange_seconds", 0.0), found.get("transfer_seconds", math.nan)
        if spent >= moved >= 0:
            whole, transfer = whole + spent, transfer + moved
    return 1 - transfer / whole if whole > 0 else None


def wire_of(runs: Sequence[Timed]) -> Wire | None:
    """Bytes of the measured steps."""
    found = []
    for run in runs:
        measured = [numbers(get(run.plan, "measured", key)) for key in ("wire_bytes", "foretold_wire_bytes")]
        if run.nodes is None or not measured[0] or not measured[1]:
            continue
        per_node = run.world // run.nodes
        rings = [ring_bytes(Counter(one), run.nodes, per_node).values() for one in measured]
        sent = [sum(max(ring) for ring in ring_of) for ring_of in rings]
        found.append((sum(measured[0].values()), sum(measured[1].values()), *sent))
    if not found:
        return None
    given, foretold_given, sent, foretold_sent = np.mean(found, axis=0).tolist()
    return Wire(given=given, foretold_given=foretold_given, sent=sent, foretold_sent=foretold_sent)


def foretold(run: Timed) -> Foretold | None:
    """What plan.json has for its world."""
    seconds = numbers(get(run.plan, "predicted", "seconds"))
    step = seconds.get("step", 0.0)
    if not step > 0:
        return None
    return Foretold(
        hardware=plain(str(get(run.plan, "hardware", "name"))),
        step_seconds=step,
        clips_per_second=run.batch / step,
        exchange_share=seconds.get("exchange", 0.0) / step,
    )


def series_of(points: Sequence[Point], rates: Sequence[Estimate]) -> Iterable[Series]:
    """Points of one batch, and points of one batch per rank, over at least two world sizes."""
    kinds: dict[tuple[Any, float], list[int]] = {}
    for index, point in enumerate(points):
        kinds.setdefault(("weak", point.batch / point.ranks), []).append(index)
        kinds.setdefault(("strong", point.batch), []).append(index)
    for (kind, clips), members in sorted(kinds.items()):
        if len({points[index].ranks for index in members}) > 1:
            yield Series(kind=kind, clips=clips, entries=list(entries(points, rates, members)))


def entries(points: Sequence[Point], rates: Sequence[Estimate], members: Sequence[int]) -> Iterable[Entry]:
    """Efficiency of each member, of the first one's."""
    first = members[0]
    for index in members:
        ranks = points[first].ranks / points[index].ranks
        own, base = points[index].foretold, points[first].foretold
        yield Entry(
            point=index,
            efficiency=Figure(value=1.0) if index == first else figure(rates[index].over(rates[first]).times(ranks)),
            foretold_efficiency=None if not own or not base else own.clips_per_second / base.clips_per_second * ranks,
        )


def remarks(points: Sequence[Point], series: Sequence[Series]) -> Iterable[str]:
    """What a reader of the numbers should know."""
    if len({point.ranks for point in points}) == 1:
        yield f"All runs have {points[0].ranks} rank(s): efficiency needs at least two world sizes."
    within = {entry.point for one in series for entry in one.entries}
    for index, point in enumerate(points):
        where = f"{name_of(point)}, batch {point.batch}"
        if index not in within and len(points) > 1:
            yield f"{where}: no other world has this batch, or as many clips per rank: it stands alone."
        if 1 < len(point.runs) < RUNS:
            yield f"{where}: {len(point.runs)} runs are too few to see how runs differ; the intervals hold within them."
        if point.step_seconds.low is None:
            yield f"{where}: {point.steps} counted steps are too few for intervals."
        if point.opening_share > OPENING:
            share = f"{point.opening_share:.0%} of the time is in first steps of epochs, where loading begins"
            yield f"{where}: {share}; longer epochs spare it."
        wire = point.wire
        if wire is not None and wire.sent > 0 and abs(wire.foretold_sent / wire.sent - 1) > SPREAD:
            yield f"{where}: foretold bytes on the wire are {wire.foretold_sent / wire.sent:.1%} of the measured ones."
    for one in series:
        splits = [round(points[entry.point].micro_steps, 2) for entry in one.entries]
        if len(set(splits)) > 1:
            told = " → ".join(f"{split:g}" for split in splits)
            yield (
                f"{one.kind} scaling, {one.clips:g} clips: micro-steps per step are {told}; with exact losses all but "
                "one run forward twice, so worlds with fewer of them compute less."
            )


def name_of(point: Point) -> str:
    """A point in words."""
    nodes = "" if point.nodes in (1, None) else f" on {point.nodes} nodes"
    return f"{point.ranks} rank{'s' * (point.ranks > 1)}{nodes}"
