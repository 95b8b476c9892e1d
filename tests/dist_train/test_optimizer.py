from __future__ import annotations

import math
import secrets
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dist_train.optimizer import OptimizerSettings, ScheduleSettings, build_optimizer
from tests.ranks import run_ranks


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


def test_moments_in_8_bits_follow_those_in_32() -> None:
    """The first update is exact (its moments are those of one gradient); later ones differ by the rounding."""
    weights = [torch.nn.Parameter(torch.randn(5000)) for _ in range(2)]
    weights[1].data.copy_(weights[0])
    start = weights[0].detach().clone()
    optimizers = [
        build_optimizer(OptimizerSettings(name=name, learning_rate=0.01, weight_decay=0.3), [weight])
        for name, weight in zip(("adamw", "adamw_8bit"), weights, strict=True)
    ]
    for step in range(10):
        gradient = torch.randn(5000) + 0.5
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
        if step == 0:
            torch.testing.assert_close(weights[1], weights[0], atol=1e-5, rtol=1e-5)
    moved = [weight.detach() - start for weight in weights]
    assert (moved[1] - moved[0]).norm() < 0.05 * moved[0].norm()
    assert {value.dtype for value in optimizers[1].state[weights[1]].values() if torch.is_tensor(value)} == {
        torch.uint8,
        torch.float32,
    }


SETTINGS = [
    {"stage": 0},
    {"stage": 1},
    {"stage": 2},
    {"stage": 3},
    {"stage": 2, "offload_optimizer": "cpu"},
    {"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_a_checkpoint_continues_under_every_stage_and_offload(name: str, precision: str, tmp_path: Path) -> None:
    """torch's moments exactly. Those in 8 bits to the last bit of fp32 where they are cut alike, else rounded once."""
    found = run_ranks(
        "resumed", 2, tmp_path, module="tests.dist_train.work_adapters",
        seed=secrets.randbits(31), optimizer=name, bf16=precision == "bf16", settings=SETTINGS,
    )  # fmt: skip
    assert len(found) == len(SETTINGS) ** 2
    alike = [{0}, {1, 2, 4}, {3, 5}]
    for pair, found_there in found.items():
        cut_alike = any(set(map(int, pair.split())) <= cut for cut in alike)
        moments, losses = (0.0, 0.0) if name == "adamw" else (1e-6, 1e-4) if cut_alike else (0.06, 0.02)
        assert found_there["moments"] <= moments and found_there["losses"] <= losses, (pair, found_there)
        assert found_there["eight_bit"] == (name == "adamw_8bit")
