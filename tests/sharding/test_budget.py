"""Batches by budget: every sample once, no slot beyond a limit, the same number of micro-steps on all ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.budget import Cost, compose, oversized
from sharding.order import EpochPlan

seconds = st.lists(st.floats(0.02, 60), min_size=1, max_size=60).map(np.array)
worlds = st.integers(1, 5)
leasts = st.integers(1, 4)


def costs_of(values: np.ndarray, seconds: float, squared: float, tokens: float) -> tuple[Cost, ...]:
    """Limits that each sample keeps by itself: `seconds` … are multiples of the largest sample's."""
    kinds = (
        ("seconds", values, seconds, True),
        ("squared", values**2, squared, True),
        ("tokens", values, tokens, False),
    )
    return tuple(Cost(name, made, float(made.max() * factor), padded) for name, made, factor, padded in kinds)


factors = st.floats(1, 12)


@given(values=seconds, world=worlds, least=leasts, a=factors, b=factors, c=factors)
def test_every_sample_once_and_no_slot_beyond_a_limit(values, world, least, a, b, c):
    costs = costs_of(values, a, b, c)
    batch = np.random.default_rng().permutation(len(values))
    layout = compose(batch, costs, world, least)
    assert len(layout) >= least and {len(slots) for slots in layout} == {world}
    slots = [slot for micro in layout for slot in micro]
    assert sorted(index for slot in slots for index in slot) == list(range(len(values)))
    for slot in slots:
        for cost in costs:
            taken = len(slot) * max(cost.values[slot], default=0) if cost.padded else cost.values[slot].sum()
            assert taken <= cost.limit * (1 + 1e-9)
    assert compose(batch[::-1], costs, world, least) == layout  # the order of the batch does not show


@given(values=seconds, world=worlds)
def test_one_wide_limit_needs_one_micro_step(values, world):
    assert len(compose(np.arange(len(values)), costs_of(values, 1e3, 1e3, 1e3), world)) == 1


def test_equal_samples_are_shared_out_evenly_over_the_fewest_micro_steps():
    costs = (Cost("seconds", np.full(24, 10.0), 40.0, padded=True),)
    layout = compose(np.arange(24), costs, world_size=2)
    assert [[len(slot) for slot in micro] for micro in layout] == [[4, 4]] * 3


def test_a_long_clip_does_not_pad_short_ones():
    values = np.array([60.0] + [1.0] * 59)
    layout = compose(np.arange(60), (Cost("seconds", values, 60.0, padded=True),), world_size=2)
    assert layout == [[[0], list(range(1, 60))]]


def test_a_sample_beyond_a_limit_gets_a_slot_of_its_own_and_is_named():
    cost = Cost("seconds", np.array([5.0, 80.0, 5.0]), 60.0, padded=True)
    assert compose(np.arange(3), (cost,), world_size=1) == [[[1]], [[0, 2]]]
    assert oversized((cost,)) == [(cost, 1)] and not oversized((Cost("s", np.array([5.0]), 5.0, padded=True),))


@given(values=seconds, world=worlds, seed=st.integers(0, 2**32), batch=st.integers(1, 30), factor=st.floats(1, 6))
def test_an_epoch_by_budget_visits_each_sample_once_in_the_same_batches(values, world, seed, batch, factor):
    def plan(ranks: int) -> EpochPlan:
        costs = (Cost("seconds", values, float(values.max() * factor), padded=True),)
        return EpochPlan(len(values), batch, 1, ranks, seed, epoch=1, costs=costs)

    mine, alone = plan(world), plan(1)
    plain = EpochPlan(len(values), batch, 1, 3, seed, epoch=1)
    for step in range(mine.steps):
        for made in (mine, alone):
            rows = [
                [made.micro_batch(step, micro, rank) for rank in range(made.world_size)]
                for micro in range(made.micro_steps(step))
            ]
            assert [[len(row) for row in micro] for micro in rows] == made.rows(step)
            assert min(len(row) for micro in rows for row in micro) >= 1  # every rank runs every micro-step
            real = [index for micro in rows for row in micro for index, is_real in row if is_real]
            assert sorted(real) == sorted(plain.batch(step).tolist())


@pytest.mark.parametrize("bad", [1, -1])
def test_beyond_the_micro_steps(bad):
    plan = EpochPlan(4, 4, 1, 1, 0, 0, costs=(Cost("s", np.ones(4), 4.0, padded=True),))
    assert plan.micro_steps(0) == 1
    with pytest.raises(IndexError):
        plan.micro_batch(0, bad, 0)
