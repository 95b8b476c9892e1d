"""Planted trainables that cannot learn are found under every ZeRO stage, and none that can."""

from __future__ import annotations

import re
import secrets
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sharding.census import grouped, owner
from tests.ranks import run_ranks

UNCALLED = (
    r"step 1: 12 of 20 trainables got no gradient, and the layers that hold them are never called.*"
    r"wavlm\.encoder\.layers\.\*\.attention\.q_proj\.\S+ \(3\).*attention\.out_proj\.\S+ \(3\).*target_modules"
)
BRANCH = r"branch\.weight, branch\.bias"
EXPECTED: dict[str, tuple[str | None, int]] = {
    "lora": (None, 2),
    "dora": (None, 2),
    "vera": (None, 2),
    "full": (None, 1),
    "lora heard": (None, 2),
    "lora uncalled": (UNCALLED, 1),
    "vera uncalled": (UNCALLED, 1),
    "none": (None, 1),
    "detached": (rf"step 1: 2 of 4 trainables got no gradient although their layers run.*{BRANCH}\. Freeze", 1),
    "zero": (rf"step 3: 2 of 4 trainables got only zeros as gradient in the first 3 steps.*{BRANCH}\. Freeze", 3),
    "zero at first": (None, 2),
    "zero on one rank": (None, 1),
    "infinite on one rank": (rf"step 1: 4 of 4 trainables got a gradient that is not finite.*{BRANCH}\. Lower", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_cannot_learn_is_named_with_the_cause(stage: int, tmp_path: Path) -> None:
    found = run_ranks(
        "census", 2, tmp_path, module="tests.dist_train.work_adapters", seed=secrets.randbits(31), stage=stage
    )
    assert found.keys() == EXPECTED.keys()
    for name, ranks in found.items():
        said, done = ranks[0]
        assert ranks[1] == ranks[0]
        pattern, last = EXPECTED[name]
        assert (said is None) == (pattern is None) and done == last, (name, said, done)
        assert pattern is None or re.fullmatch(pattern + r".*", said), (name, said)


@given(st.integers(0, 120), st.integers(0, 9))
def test_names_that_differ_in_numbers_are_told_once(layers: int, others: int) -> None:
    names = [f"a.layers.{i}.b2.weight" for i in range(layers)] + [f"x{i}" for i in range(others)]
    told = grouped(names)
    kinds = others + (layers > 0)
    assert len(told.split(", ")) == min(kinds, 9 if kinds > 8 else 8) or kinds == 0
    if layers > 1:
        assert told.startswith(f"a.layers.*.b2.weight ({layers})")
    assert ("more kinds" in told) == (kinds > 8)


def test_the_owner_of_a_parameter_is_the_module_that_is_called() -> None:
    inner = nn.Linear(1, 1)
    inner.scales = nn.ParameterDict({"default": nn.Parameter(inner.weight)})
    model = nn.Sequential(inner)
    assert owner(model, "0.scales.default") is inner and owner(model, "0.weight") is inner
    model.gate = nn.Parameter(inner.weight)
    assert owner(model, "gate") is model
