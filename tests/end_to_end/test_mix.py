"""A mix of two datasets, from recipe to report, and what is wrong with a mix told in one pass."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dist_train.recipe import write_recipe
from sharding.shard_writer import pack_sample, write_dataset
from sharding.shards import Dims, load_info
from sharding.stream import ShardedSplit
from tests import tiny
from tests.end_to_end.commands import Refused, call, metrics, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets whose keys are the same."""
    made = tmp_path_factory.mktemp("mix")
    tiny.write_corpus(made / "a", seed=1)
    tiny.write_corpus(made / "b", train=12, valid=3, test=0, seed=2)
    return made


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Path:
    sources = [{"path": str(folder / "b"), "weight": 2}, {"path": str(folder / "a"), "weight": 1}]
    mixed = {"path": None, "sources": sources, "shuffle": "windowed", "window": 8, "block": 4}
    write_recipe(tiny.recipe(folder, data=mixed, training={"epochs": 2}), folder / "recipe.yaml")
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    """An undisturbed run of 2 ranks."""
    output = recipe.parent / "whole"
    done = run("train", recipe, "--output", output, "--ranks", "2")
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.slow
def test_a_mix_is_trained_and_reported(folder: Path, whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["samples"] == 2 * (22 + 12) and (whole / "report.html").is_file()
    note = "An epoch of 34 clips mixes 11 of a (0.5 passes over its 22), 23 of b (1.9 passes over its 12)."
    assert note in summary["notes"] and note in (whole / "report.html").read_text(encoding="utf-8")
    with (whole / "predictions_test.csv").open(newline="", encoding="utf-8") as file:
        keys = [row["key"] for row in csv.DictReader(file)]
    assert keys == [f"a/{key}" for key in ShardedSplit(folder / "a", "test").keys]
    assert run("evaluate", whole, "--split", "valid", "--ranks", "1").returncode == 0
    with (whole / "predictions_valid.csv").open(newline="", encoding="utf-8") as file:
        assert [row["key"] for row in csv.DictReader(file)] == [f"a/valid00{i}" for i in range(6)] + [
            f"b/valid00{i}" for i in range(3)
        ]
    plan = json.loads((whole / "plan.json").read_text())
    assert "33% " in plan["corpus"] and str(folder / "b") in plan["corpus"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_rank_goes_on_where_two_stopped_with_other_tars_of_the_same_clips(
    folder: Path, recipe: Path, whole: Path
) -> None:
    parts = folder / "parts"
    assert run("train", recipe, "training.epochs=1", "--output", parts, "--ranks", "2").returncode == 0
    before = load_info(folder / "a").content_hash
    rewrite(folder / "a", samples_per_shard=5)
    assert load_info(folder / "a").content_hash == before
    done = run("train", recipe, "--output", parts, "--ranks", "1", "--resume")
    assert done.returncode == 0, done.stderr
    expected, found = metrics(whole), metrics(parts)
    assert [row["clips"] for row in found] == [row["clips"] for row in expected] == [6, 6, 6, 6, 6, 4] * 2
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-4)

    shutil.rmtree(folder / "a")
    tiny.write_corpus(folder / "a", seed=3)
    done = run("train", recipe, "training.epochs=3", "--output", parts, "--ranks", "1", "--resume")
    assert done.returncode == 2 and "was trained on other clips" in done.stderr and "Traceback" not in done.stderr


def rewrite(root: Path, samples_per_shard: int) -> None:
    """The same clips in other tars."""
    splits = {name: ShardedSplit(root, name) for name in load_info(root).splits}
    dims = Dims(audio="waveform", text=None, vision=tiny.VISION_WIDTH)
    made = root.with_name("rewritten")
    with write_dataset(made, dims=dims, label_range=(-3.0, 3.0), samples_per_shard=samples_per_shard) as writer:
        for name, split in splits.items():
            for i in np.random.default_rng().permutation(len(split)).tolist():
                sample = {key: value for key, value in split[i].items() if key != "index"}
                writer.add(name, pack_sample(split=name, **sample))
    shutil.rmtree(root)
    made.rename(root)


def test_a_mix_is_planned(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", recipe, "--gpus-per-node", "1", "--hardware", "cpu", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert "67% " in found["corpus"]


def test_all_that_is_wrong_with_a_mix_is_told_at_once(recipe: Path, refused: Refused) -> None:
    lines = refused("recipe", recipe, "data.sources=[{path: x, weight: 0}, {path: y, wieght: 2}, {weight: 1}]")
    assert sorted(lines) == [
        "data.sources.0.weight: cannot be 0. Write a number, above 0.",
        "data.sources.1.wieght: is not a key of the recipe. Did you mean data.sources.1.weight?",
        "data.sources.2.path: is missing. Write data.sources.2.path: Directory of shards.",
    ]
    lines = refused("recipe", recipe, "data.path=x", "data.sources=[{path: p/x}, {path: q/x}]", "data.window=3")
    assert len(lines) == 3
    assert "has both path and sources" in lines[0] and "data.window" in lines[1] and "2 datasets called x" in lines[2]
    (line,) = refused("recipe", recipe, "data.sources=null")
    assert line.startswith("data.path: is missing. Write data.path: Directory of shards")
    (line,) = refused("recipe", recipe, "data.sources=[]")
    assert line.startswith("data.sources: cannot be []")


def test_a_mix_that_cannot_feed_its_ranks(recipe: Path, refused: Refused, tmp_path: Path) -> None:
    (line,) = refused("train", recipe, "--output", tmp_path / "run", "--ranks", "35")
    assert line == "data.sources: has 34 training clips for 35 ranks. Use at most 34 ranks."
