"""A run killed anywhere and continued under other ranks, workers and tars: the rest is that of the undisturbed run."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sharding.budget import Cost
from sharding.mix import MixedSplit, Part
from sharding.order import EpochPlan
from sharding.shards import load_info
from sharding.shuffle import Window, epoch_order, shares
from sharding.stream import ShardedSplit, stream
from sharding.table import filled
from tests.corpus import random_sample, write_corpus

SIZES = (1, 4, 7, 11, 16, 30)
PER_SHARD = (1, 3, 8, 100)  # one layout each; in all but the last the samples lie in no order


class Side(NamedTuple):
    """How one part of the run is cut."""

    world: int
    workers: int
    accumulation: int
    layout: int
    budget: float | None  # most audio of a slot, relative to the longest clip


class Run(NamedTuple):
    """What decides the order."""

    datasets: dict[int, float]  # size of the dataset → weight
    batch: int
    seed: int
    epoch: int
    window: Window | None


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets of each size in each layout; their keys clash."""
    rng, folder = np.random.default_rng(), tmp_path_factory.mktemp("pool")
    for size in SIZES:
        samples = [random_sample(rng, f"k{number}") for number in rng.choice(40, size, replace=False)]
        for layout, per_shard in enumerate(PER_SHARD):
            last = layout == len(PER_SHARD) - 1
            order = (
                sorted(samples, key=lambda sample: sample["key"])
                if last
                else [samples[i] for i in rng.permutation(size)]
            )
            write_corpus(folder / f"{size}-{layout}", order, per_shard)
        hashes = {load_info(folder / f"{size}-{layout}").content_hash for layout in range(len(PER_SHARD))}
        assert len(hashes) == 1
    return folder


def opened(pool: Path, run: Run, layout: int) -> ShardedSplit:
    """The run's datasets in a layout; of several, each in another."""
    roots = {size: pool / f"{size}-{(layout + place) % len(PER_SHARD)}" for place, size in enumerate(run.datasets)}
    if len(roots) == 1:
        return ShardedSplit(next(iter(roots.values())), "train")
    return MixedSplit([Part(f"of{size:02d}", root, run.datasets[size]) for size, root in roots.items()], "train")


def rows(samples: list[dict[str, Any]]) -> list[tuple[str, bool, str]]:
    """Key, real, and a digest of all that was decoded."""
    return [(sample["key"], sample["real"], digest(sample)) for sample in samples]


def digest(sample: dict[str, Any]) -> str:
    parts = [
        None if sample[name] is None else sample[name].tobytes()
        for name in ("audio", "text_features", "simulated", "vision")
    ]
    return hashlib.sha256(repr([sample["label"], sample["text"], *parts]).encode()).hexdigest()


def steps(pool: Path, run: Run, side: Side, consumed: int, end: int | None = None) -> list[list[tuple[str, bool, str]]]:
    """The global batches that all ranks of a side train on, from `consumed` samples on."""
    split = opened(pool, run, side.layout)
    costs: tuple[Cost, ...] = ()
    if side.budget is not None:
        seconds = filled(split.columns.audio_seconds) + 0.01
        costs = (Cost("audio_seconds", seconds, side.budget * float(seconds.max()), padded=True),)
    plan = EpochPlan(
        len(split), run.batch, side.accumulation, side.world, run.seed, run.epoch,
        costs=costs, sources=split.sources, window=run.window,
    )  # fmt: skip
    start = consumed // run.batch
    found: list[list[tuple[str, bool, str]]] = []
    ranks = [stream(split, plan, rank, rows, start_step=start, workers=side.workers) for rank in range(side.world)]
    for step in range(start, plan.steps if end is None else end):
        batch = []
        for _ in range(plan.micro_steps(step)):
            batch += [row for rank in ranks for row in next(rank) if row[1]]
        if costs:  # laid over the slots by length; their order within the step is the plan's
            by_key = {row[0]: row for row in batch}
            names = [split.keys[index] for index in plan.batch(step)]
            assert Counter(row[0] for row in batch) == Counter(names)
            batch = [by_key[name] for name in names]
        found.append(batch)
    if end is None:
        assert all(next(rank, None) is None for rank in ranks), "more than the epoch has"
    for rank in ranks:
        rank.close()
    return found


def check(pool: Path, run: Run, before: Side, after: Side, cut: int) -> None:
    undisturbed = steps(pool, run, Side(1, 0, 1, 0, None), 0)
    cut = cut % (len(undisturbed) + 1)
    first = steps(pool, run, before, 0, cut)
    consumed = sum(map(len, first))  # the one integer of progress
    rest = steps(pool, run, after, consumed) if cut < len(undisturbed) else []
    assert first + rest == undisturbed
    # First principles: sorted keys, in the order of the epoch; each source as often as its share says.
    split = opened(pool, run, 0)
    order = epoch_order(split.sources, run.seed, run.epoch, run.window)
    names = [split.keys[index] for index in order]
    assert [row[0] for batch in undisturbed for row in batch] == names
    if len(run.datasets) == 1:
        assert sorted(names) == list(split.keys)
    drawn = Counter(name.split("/")[0] for name in names)
    if len(run.datasets) > 1:
        assert [drawn[f"of{size:02d}"] for size in sorted(run.datasets)] == shares(split.sources)


sides = st.builds(
    Side,
    world=st.integers(1, 4),
    workers=st.just(0),
    accumulation=st.integers(1, 3),
    layout=st.integers(0, len(PER_SHARD) - 1),
    budget=st.none() | st.floats(1, 3),
)
windows = st.builds(lambda block, blocks: Window(block * blocks, block), st.integers(1, 6), st.integers(1, 4))
runs = st.builds(
    Run,
    datasets=st.dictionaries(st.sampled_from(SIZES), st.floats(0.5, 2), min_size=1, max_size=3).filter(
        lambda datasets: min(datasets.values()) * sum(datasets) > sum(datasets.values())
    ),
    batch=st.integers(1, 12),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 5),
    window=st.none() | windows,
)
PROPERTY: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@settings(max_examples=150, **PROPERTY)
@given(run=runs, before=sides, after=sides, cut=st.integers(0, 1000))
def test_the_rest_is_that_of_the_undisturbed_run(pool: Path, run: Run, before: Side, after: Side, cut: int) -> None:
    check(pool, run, before, after, cut)


@settings(max_examples=6, **PROPERTY)
@given(run=runs, before=sides, after=sides, cut=st.integers(0, 1000), workers=st.tuples(*[st.integers(0, 3)] * 2))
def test_also_with_worker_processes(
    pool: Path, run: Run, before: Side, after: Side, cut: int, workers: tuple[int, int]
) -> None:
    before, after = (
        side._replace(workers=number, world=min(side.world, 2))
        for side, number in zip((before, after), workers, strict=True)
    )
    check(pool, run, before, after, cut)
