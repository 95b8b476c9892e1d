from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dist_train.optimizer import OptimizerSettings, ScheduleSettings, build_optimizer


def test_the_schedule_of_the_paper() -> None:
    schedule = ScheduleSettings(name="paper")
    found = [schedule.factor(step=7, epoch=epoch, total_steps=100) for epoch in range(25)]
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8] + [1.0] * 10 + [0.9] * 10 + [0.81])


def test_others_warm_up_and_end() -> None:
    for name in ("constant", "linear", "cosine"):
        schedule = ScheduleSettings(name=name, warmup_steps=4)
        rates = [schedule.factor(step, 0, 24) for step in range(25)]
        assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
        assert rates[24] == pytest.approx(1.0 if name == "constant" else 0.0)
        assert rates[23] > 0
        assert all(before >= after for before, after in pairwise(rates[4:]))
    linear, cosine = (ScheduleSettings(name=name, warmup_steps=4) for name in ("linear", "cosine"))
    assert linear.factor(9, 0, 24) == pytest.approx(0.75)
    assert cosine.factor(9, 0, 24) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


@given(st.sampled_from(["paper", "constant", "linear", "cosine"]), st.integers(0, 50), st.integers(1, 40), st.data())
def test_the_factor_is_always_above_0_and_at_most_1(name: str, warmup: int, total: int, data: st.DataObject) -> None:
    """Also where the warm-up is longer than the run."""
    step = data.draw(st.integers(0, total - 1))
    schedule = ScheduleSettings(name=name, warmup_steps=warmup)
    assert 0 < schedule.factor(step, step // 3, total) <= 1


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_weight_decay_is_coupled_in_adam_and_decoupled_in_adamw(name: str) -> None:
    """One step by hand: the first update of Adam is the sign of the gradient, decay coupled or not."""
    weight = torch.nn.Parameter(torch.randn(50, dtype=torch.float64))
    start, gradient = weight.detach().clone(), torch.randn(50, dtype=torch.float64)
    settings = OptimizerSettings(name=name, learning_rate=0.01, weight_decay=0.3, betas=(0.8, 0.9), epsilon=1e-3)
    weight.grad = gradient.clone()
    build_optimizer(settings, [weight]).step()
    coupled = name == "adam"
    g = gradient + 0.3 * start if coupled else gradient
    decayed = start if coupled else start * (1 - 0.01 * 0.3)
    torch.testing.assert_close(weight.detach(), decayed - 0.01 * g / (g.abs() + 1e-3))


@pytest.mark.parametrize(
    "wrong",
    [
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.9)},
        {"betas": (0.9,)},
        {"learning_rate": 0},
        {"learning_rate": math.inf},
        {"weight_decay": -1},
        {"epsilon": math.nan},
        {"clip_norm": -1},
    ],
)
def test_settings_torch_would_choke_on_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        OptimizerSettings(**wrong)
