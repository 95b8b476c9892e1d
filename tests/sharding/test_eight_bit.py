"""Moments in 8 bits, written out and packed again, against bitsandbytes' own rounding."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional
from hypothesis import given
from hypothesis import strategies as st

from sharding import eight_bit
from sharding.engine_state import MOMENTS


def trained(size: int, steps: int) -> Any:
    """The state of AdamW8bit after some steps over gradients of very different sizes."""
    weight = torch.nn.Parameter(torch.randn(size))
    optimizer = bitsandbytes.optim.AdamW8bit([weight], lr=0.01)
    for _ in range(steps):
        weight.grad = torch.randn(size) * torch.logspace(-8, 4, size)
        weight.grad[: size // 3] = 0  # whole blocks of zeros
        optimizer.step()
    return optimizer.state[weight]


@pytest.mark.parametrize("size", [4096, 5000, 70_001])
@pytest.mark.parametrize("steps", [1, 4])
def test_written_out_and_packed_again_they_are_the_same(size: int, steps: int) -> None:
    state = trained(size, steps)
    before = {name: value.clone() for name, value in state.items() if torch.is_tensor(value)}
    assert before["state1"].dtype == torch.uint8
    whole = {name: eight_bit.read(state, name, 0, size) for name in MOMENTS}
    for name, value in whole.items():
        eight_bit.unpacked(state, name).copy_(value)
    eight_bit.pack(state)
    assert state.keys() - {"step"} == before.keys()
    for name in MOMENTS:  # a code of a block of zeros is free
        torch.testing.assert_close(eight_bit.read(state, name, 0, size), whole[name], rtol=3e-7, atol=0)
    for number in (1, 2):
        torch.testing.assert_close(state[f"absmax{number}"], before[f"absmax{number}"], rtol=1e-6, atol=0)


@given(st.data())
def test_any_part_can_be_read(data: st.DataObject) -> None:
    state = trained(4500, 1)
    start = data.draw(st.integers(0, 4499))
    count = data.draw(st.integers(0, 4500 - start))
    for name, number in eight_bit.NUMBER.items():
        expected = functional.dequantize_blockwise(
            state[f"state{number}"], absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=256
        )
        assert torch.equal(eight_bit.read(state, name, start, count), expected[start : start + count])


@pytest.mark.parametrize("signed", [True, False])
def test_fresh_numbers_are_rounded_as_bitsandbytes_does(signed: bool) -> None:
    """But for the scale of a block whose largest magnitude is negative: ours is the one the map can reach. And second
    moments that are nearest to 0 stay above, by the least there is.
    """
    values = torch.randn(3000) * torch.logspace(-6, 3, 3000)
    values = values if signed else values.abs()
    values[::256] = values.abs().max() * torch.linspace(1, 2, 12)  # the largest of each block is positive
    values[7::256] = values[::256] * 1e-9  # too small for any code
    levels = functional.create_dynamic_map(signed=signed)
    codes, magnitudes = eight_bit.packed(values, levels)
    expected, state = functional.quantize_blockwise(values, code=levels, blocksize=256)
    assert torch.equal(magnitudes, state.absmax)
    found = levels[codes.long()] * magnitudes.repeat_interleave(256)[:3000]
    theirs = levels[expected.long()] * state.absmax.repeat_interleave(256)[:3000]
    if not signed:
        least = levels[levels > 0].min() * magnitudes.repeat_interleave(256)[:3000]
        lost = values < least / 2
        assert lost.any() and torch.equal(found[lost], least[lost])
        found, theirs, values = found[~lost], theirs[~lost], values[~lost]
    assert ((found - values).abs() <= (theirs - values).abs() * (1 + 1e-5) + 1e-12).all()


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=600))
def test_second_moments_are_0_where_they_were(numbers: list[float]) -> None:
    """One that became 0 would make the step of its element, divided by its root, hundreds of times too wide."""
    values = torch.tensor(numbers)
    values = values.where(values > 1e-30, 0)  # below, their share of the largest is no number of single precision
    levels = functional.create_dynamic_map(signed=False)
    codes, magnitudes = eight_bit.packed(values, levels)
    found = levels[codes.long()] * magnitudes.repeat_interleave(256)[: len(values)]
    assert torch.equal(found > 0, values > 0)


def test_small_tensors_are_held_in_fp32() -> None:
    state = trained(100, 2)
    assert state["state1"].dtype == torch.float32
    assert torch.equal(eight_bit.read(state, "exp_avg", 10, 5), state["state1"][10:15])
    eight_bit.unpacked(state, "exp_avg_sq")[3] = 7.0
    eight_bit.pack(state)
    assert state["state2"][3] == 7.0
