"""The planner's curve: each of its points against a plan of that world, and where it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from dist_train.cli import app
from dist_train.plan import Planner, predict_epoch
from dist_train.plan_corpus import corpus_of, load_of
from dist_train.recipe import Recipe
from dist_train.scaling_curve import curve_table
from dist_train.scaling_model import Curve, model_scaling, read_scale
from sharding.errors import UserError
from sharding.hardware import PROFILES
from tests import tiny

H100 = PROFILES["h100"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return tiny.recipe(tiny.write_corpus(tmp_path_factory.mktemp("corpus") / "data", train=96), data={"batch": 12})


@pytest.fixture(scope="module")
def made(recipe: Recipe) -> Curve:
    return model_scaling(recipe, H100, read_scale("2..16", 4), 4)


def test_points_are_those_of_plans(made: Curve, recipe: Recipe) -> None:
    assert [(world.gpus, world.nodes, world.batch) for world in made.weak] == [
        (2, 1, 12), (4, 1, 24), (8, 2, 48), (16, 4, 96),
    ]  # fmt: skip
    assert [(world.gpus, world.batch) for world in made.strong] == [(2, 12), (4, 12), (8, 12), (12, 12)]
    for world in (made.weak[2], made.strong[3]):
        alone = recipe.model_copy(update={"data": recipe.data.model_copy(update={"batch": world.batch})})
        alone, lengths = corpus_of(alone)
        plan = predict_epoch(Planner(alone, None, H100, world.nodes, 4), load_of(alone, lengths, world.gpus))
        assert world.step_seconds == pytest.approx(plan.seconds["step"]) and world.link_bytes == plan.link_bytes
        ring = (world.gpus - 1) / world.gpus
        sent = sum(size * (1 + (name == "all_reduce")) for name, size in plan.wire_bytes.items()) * ring
        assert world.link_bytes["between"] == pytest.approx(sent)


def test_efficiency_and_its_variants(made: Curve) -> None:
    for worlds in (made.weak, made.strong):
        first = worlds[0]
        for world in worlds:
            rate = world.batch / world.step_seconds / world.gpus
            assert world.efficiency == pytest.approx(rate / (first.batch / first.step_seconds / first.gpus))
            assert world.slow_efficiency < world.efficiency
            assert world.exchange_share == pytest.approx(world.seconds["exchange"] / world.step_seconds)
    assert made.weak[0].even_efficiency == 1 and all(world.even_efficiency for world in made.weak)
    assert all(world.even_efficiency is None for world in made.strong)


def test_where_it_ends_is_said(made: Curve) -> None:
    notes, assumed = "\n".join(made.notes), "\n".join(made.assumptions)
    assert "Strong scaling ends at 12 GPUs: a batch of 12 feeds at most 12; 16 GPUs would have 0.75" in notes
    assert "96 clips, 1 steps per epoch" in notes
    for told in ("450 GB/s", "400 GB/s", "30 µs per collective", "Overlap: none", "Not in the model"):
        assert told in assumed
    console = Console(record=True, width=80)
    console.print(curve_table(made))
    assert "…" not in console.export_text()


@pytest.mark.parametrize(
    ("text", "problem"), [("8", "cannot be"), ("16..8", "cannot be"), ("0..4", "cannot be"), ("6..24", "do not fill")]
)
def test_scales_that_are_none(text: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        read_scale(text, 8)
    assert read_scale("8..512", 8) == [8, 16, 32, 64, 128, 256, 512] and read_scale("1..5", 8) == [1, 2, 4]


def test_the_command_writes_json_and_figure(recipe: Recipe, tmp_path: Path) -> None:
    path, out = tmp_path / "recipe.yaml", tmp_path / "curve.json"
    path.write_text(json.dumps(recipe.model_dump(mode="json")))
    command = ["plan", str(path), "--scale", "1..4", "--gpus-per-node", "2", "--output", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "Weak scaling" in result.output and "Foretold with" in result.output
    found = Curve.model_validate_json(out.read_text())
    assert [world.gpus for world in found.strong] == [1, 2, 4] and (tmp_path / "curve.png").stat().st_size > 10_000
    refused = CliRunner().invoke(app, [*command, "--nodes", "2"])
    assert isinstance(refused.exception, UserError) and "--nodes" in str(refused.exception)
    few = CliRunner().invoke(app, ["plan", str(path), "--scale", "16..32", "--gpus-per-node", "2"])
    assert isinstance(few.exception, UserError) and "feeds at most 12 GPUs" in str(few.exception)
