"""The order is a pure function; every sample is trained on once, whatever the ranks and micro-steps."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.order import EpochPlan
from sharding.shuffle import permutation

plans = st.builds(
    EpochPlan,
    samples=st.integers(1, 120),
    global_batch=st.integers(1, 40),
    accumulation=st.integers(1, 5),
    world_size=st.integers(1, 9),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 1000),
    shuffle=st.booleans(),
)


def _slots(plan: EpochPlan, step: int) -> list[list[tuple[int, bool]]]:
    return [plan.micro_batch(step, m, r) for m in range(plan.accumulation) for r in range(plan.world_size)]


@given(plan=plans)
def test_each_sample_once_and_equal_rows_everywhere(plan):
    expected = permutation(plan.samples, plan.seed, plan.epoch) if plan.shuffle else np.arange(plan.samples)
    seen: list[int] = []
    for step in range(plan.steps):
        slots = _slots(plan, step)
        real = [index for slot in slots for index, is_real in slot if is_real]
        size = min(plan.global_batch, plan.samples - step * plan.global_batch)
        rows = -(-size // (plan.world_size * plan.accumulation))
        assert {len(slot) for slot in slots} == {rows} == {n for micro in plan.rows(step) for n in micro}
        assert real == plan.batch(step).tolist()
        assert {index for slot in slots for index, _ in slot} == set(real)  # fillers repeat the batch's own samples
        seen += real
    assert seen == expected.tolist()


@given(plan=plans, world=st.integers(1, 9), accumulation=st.integers(1, 5))
def test_the_global_batch_does_not_depend_on_the_ranks(plan, world, accumulation):
    other = EpochPlan(plan.samples, plan.global_batch, accumulation, world, plan.seed, plan.epoch, plan.shuffle)
    assert other.steps == plan.steps
    for step in range(plan.steps):
        real = [[i for slot in _slots(p, step) for i, is_real in slot if is_real] for p in (plan, other)]
        assert real[0] == real[1]


@settings(max_examples=20)
@given(plan=plans)
def test_real_rows_are_spread_evenly(plan):
    for step in range(plan.steps):
        counts = [sum(real for _, real in slot) for slot in _slots(plan, step)]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("call", [(9, 0, 0), (-1, 0, 0), (0, 2, 0), (0, 0, 3), (0, -1, 0)])
def test_beyond_the_plan(call):
    with pytest.raises(IndexError):
        EpochPlan(90, 10, 2, 3, 0, 0).micro_batch(*call)


@pytest.mark.parametrize("field", ["samples", "global_batch", "accumulation", "world_size"])
def test_sizes_below_one_are_refused(field):
    sizes: dict[str, Any] = {"samples": 3, "global_batch": 2, "accumulation": 1, "world_size": 1, field: 0}
    with pytest.raises(ValueError, match=field):
        EpochPlan(**sizes, seed=0, epoch=0)
