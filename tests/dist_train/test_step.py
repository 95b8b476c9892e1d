"""One optimizer step over several micro-steps: the loss and gradient of one graph that holds all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dist_train.build import build_collator, build_model, open_split
from dist_train.costs import clip_costs
from dist_train.global_loss import unpack
from dist_train.losses import double_flow_loss
from dist_train.recipe import Recipe
from dist_train.step import Stepper, StepResult
from sharding.agreement import Agreement
from sharding.census import Census
from sharding.errors import UserError
from sharding.order import EpochPlan
from tests import tiny
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus") / "shards")


STEP = 7


class PlainEngine:
    """What Step asks of an engine, without one: gradients stay in the parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.module = model
        self.forwards = 0
        self.ended: list[bool] = []

    def __call__(self, batch: Any) -> Any:
        self.forwards += 1
        return self.module(batch)

    def train(self) -> None:
        self.module.train()

    def set_gradient_accumulation_boundary(self, ends: bool) -> None:
        self.ended.append(ends)

    def backward(self, loss: Tensor, *, scale_wrt_gas: bool) -> None:
        assert not scale_wrt_gas
        loss.backward()

    def step(self) -> None:
        pass


def made(shards: Path, budget: dict[str, float] | None = None, **changes: Any) -> Recipe:
    data = {"batch": 22, "budget": budget or {}}
    return tiny.recipe(shards, widths={"vision": tiny.VISION_WIDTH}, data=data, **changes)


class Bench:
    """A model, the micro-batches of one step over all 22 clips, and the step."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, accumulation: int) -> None:
        self.recipe, self.split = recipe, open_split(recipe, "train")
        self.model = build_model(recipe, tokenizer)
        collate = build_collator(recipe, tokenizer, self.model)
        costs = clip_costs(recipe, self.split)
        self.plan = EpochPlan(len(self.split), 22, accumulation, 1, seed=1, epoch=0, costs=costs)
        self.batches = []
        for micro in range(self.plan.micro_steps(0)):
            samples = [{**self.split[index], "real": real} for index, real in self.plan.micro_batch(0, micro, 0)]
            self.batches.append(collate(samples))
        self.engine = PlainEngine(self.model)

    def stepper(self, *, exact: bool) -> Stepper:
        return Stepper(
            self.engine,
            self.recipe.loss,
            exact=exact,
            keys=self.split.keys,
            seed=self.recipe.seed,
            agreement=Agreement(self.model, until=STEP + 1),
            census=Census(self.model, steps=STEP + 10),
        )

    def run(self, *, exact: bool = True) -> tuple[StepResult, dict[str, Tensor]]:
        self.model.zero_grad()
        result = self.stepper(exact=exact).run(iter(self.batches).__next__, self.plan.rows(0), 22, step=STEP, epoch=0)
        return result, self.gradients()

    def one_graph(self) -> tuple[dict[str, float], dict[str, Tensor]]:
        """The reference: all micro-batches in one graph, the same dropout draws."""
        self.model.zero_grad()
        step = self.stepper(exact=True)
        step.step = STEP
        self.model.train()
        packed = [step.forward(micro, batch) for micro, batch in enumerate(self.batches)]
        rows, *_ = unpack(torch.cat([part.rows for part in packed]), packed[0].shapes)
        loss, terms = double_flow_loss(rows.complete, rows.missing, rows.label, rows.has_teacher, self.recipe.loss)
        loss.backward()
        return {"loss": loss.item(), **{name: term.item() for name, term in terms.items()}}, self.gradients()

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative distance of two gradients."""
    assert found.keys() == expected.keys()
    left, right = (torch.cat([x[name].flatten() for name in expected]).double() for x in (found, expected))
    return float((left - right).norm() / right.norm())


@pytest.mark.parametrize("micro_steps", [1, 2, 5])
def test_exact_accumulation_equals_one_graph_with_dropout(
    micro_steps: int, shards: Path, tokenizer: PreTrainedTokenizerBase, world_of_one: None
) -> None:
    """22 clips over 5 micro-steps: uneven, so that fillers take part."""
    recipe = made(shards, fusion={"dropout": 0.3, "attention_dropout": 0.5}, seed=int(torch.randint(1000, ())))
    bench = Bench(recipe, tokenizer, accumulation=micro_steps)
    result, found = bench.run()
    assert bench.engine.forwards == 2 * micro_steps - 1
    assert bench.engine.ended == [False] * (micro_steps - 1) + [True] and result.micro_steps == micro_steps
    expected, gradients = bench.one_graph()
    assert {"loss": result.loss, **result.terms} == pytest.approx(expected, rel=1e-6)
    assert distance(found, gradients) < 1e-6
    again, repeated = bench.run()
    assert again.loss == result.loss and distance(repeated, found) == 0


def test_micro_steps_do_not_change_the_loss_without_dropout(
    shards: Path, tokenizer: PreTrainedTokenizerBase, world_of_one: None
) -> None:
    """And the approximate one is another loss, but for its squared errors."""
    whole, parts = (Bench(made(shards), tokenizer, accumulation=n) for n in (1, 4))
    expected, gradients = whole.run()
    exact, found = parts.run()
    assert exact.terms == pytest.approx(expected.terms, rel=1e-5) and distance(found, gradients) < 1e-5
    assert exact.tokens >= expected.tokens > 0  # fillers are run, too
    rough, other = parts.run(exact=False)
    assert rough.terms["mse_missing"] == pytest.approx(expected.terms["mse_missing"], rel=1e-5)
    assert abs(rough.terms["rnc"] / expected.terms["rnc"] - 1) > 0.01 and distance(other, gradients) > 1e-3


def test_a_budget_sets_the_micro_steps_and_not_the_loss(
    shards: Path, tokenizer: PreTrainedTokenizerBase, world_of_one: None
) -> None:
    whole = Bench(made(shards), tokenizer, accumulation=1)
    budget = {"audio_seconds": 2.0, "tokens": 120}
    parts = Bench(made(shards, budget=budget), tokenizer, accumulation=1)
    assert len(parts.batches) > 2
    assert max(batch["audio"].numel() for batch in parts.batches) <= 2.0 * 16_000 * 1.01
    expected, gradients = whole.run()
    found, reached = parts.run()
    assert found.terms == pytest.approx(expected.terms, rel=1e-5) and distance(reached, gradients) < 1e-5


def test_a_clip_beyond_the_budget_is_named(shards: Path) -> None:
    for name, limit in (("audio_seconds", 0.3), ("squared_seconds", 0.05), ("tokens", 3)):
        recipe = made(shards, budget={name: limit})
        with pytest.raises(UserError, match=rf"sample train\d+: takes .* of data.budget.{name}"):
            clip_costs(recipe, open_split(recipe, "train"))


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_runs_with_and_without_micro_steps_train_alike(stage: int, shards: Path, tmp_path: Path) -> None:
    """Real engines on two ranks: 1 or 3 micro-steps, or as many as a budget asks for (other numbers in each step)."""
    found = run_ranks("accumulated", 2, tmp_path, module="tests.dist_train.work_step", data=str(shards), stage=stage)
    assert found["micro_steps"]["whole"] == [1, 1] and found["micro_steps"]["three"] == [3, 3]
    assert len(set(found["micro_steps"]["budget"])) == 2
    for name in ("three", "budget"):
        for row, expected in zip(found["losses"][name], found["losses"]["whole"], strict=True):
            assert row == pytest.approx(expected, rel=2e-5)
