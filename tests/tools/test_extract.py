from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dist_train.features import settings_of
from dist_train.keys import flat
from dist_train.plan import Planner, predict_epoch
from dist_train.plan_corpus import corpus_of, load_of
from dist_train.plan_features import caching, feature_lengths
from dist_train.projector import Projector
from dist_train.recipe import Recipe, write_recipe
from dist_train.rollout import SimulationSettings
from sharding.errors import UserError
from sharding.hardware import PROFILES
from sharding.mix import Part, mix_info
from sharding.shard_writer import pack_sample, write_dataset
from sharding.shards import Dims, load_dataset, load_info
from sharding.stream import ShardedSplit
from tests import tiny
from tests.end_to_end.commands import errors, only_error, run, started, wait_until
from tests.ranks import run_ranks
from tests.tools.convert.runs import bases
from tests.tools.work_extract import offline
from tools.extract import deal
from tools.extract_directory import Extraction, Piece
from tools.extract_recipe import problems
from tools.shards import verify

SMALL = ("--samples-per-shard", "4")


class World(NamedTuple):
    """What features are made of."""

    folder: Path
    corpus: Path
    recipe: Callable[..., Recipe]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A corpus, and recipes of frozen tiny models for it; clips of the corpus lack each modality."""
    folder = tmp_path_factory.mktemp("extract")
    corpus = tiny.write_corpus(folder / "shards")
    found = bases(folder)
    projector = Projector(64, 64, SimulationSettings(projector_width=16))
    for parameter in projector.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    weights = {f"encoder_projector.{name}": value.data for name, value in projector.named_parameters()}
    save_file(weights, folder / "projector.safetensors")

    def recipe(**changes: Any) -> Recipe:
        given = {
            "audio": {"config": None, "pretrained": str(found["audio"]), "tuning": "frozen"},
            "text": {"config": None, "pretrained": str(found["llm"]), "tuning": "frozen"},
            "simulation": {"rollout": "generate", "projector": str(folder / "projector.safetensors")},
        }
        return tiny.recipe(corpus, **tiny.merge(given, changes))

    return World(folder, corpus, recipe)


def extracted(recipe: Path, out: Path, *words: str, ranks: int = 1) -> Path:
    done = run("extract", recipe, out, *SMALL, "--ranks", str(ranks), *words)
    assert done.returncode == 0, done.stderr
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def generated(world: World) -> Path:
    """float32 features with decoded answers, made by two ranks."""
    write_recipe(world.recipe(), world.folder / "joint.yaml")
    return extracted(world.folder / "joint.yaml", world.folder / "generated", "--dtype", "float32", ranks=2)


@pytest.mark.slow
def test_joint_and_offline_give_the_same_predictions(world: World, generated: Path, tmp_path: Path) -> None:
    """From frozen models and from a run's checkpoint, on two ranks; float16 rounds, and no more."""
    run_directory = tmp_path / "run"
    changes: dict[str, Any] = {"audio": {"tuning": "lora"}, "text": {"tuning": "lora"}}
    write_recipe(world.recipe(simulation={"rollout": "prefix"}, **changes), tmp_path / "trained.yaml")
    done = run("train", tmp_path / "trained.yaml", "--output", run_directory)
    assert done.returncode == 0, done.stderr
    write_recipe(world.recipe(simulation={"rollout": "prefix"}), tmp_path / "prefix.yaml")
    joint = world.folder / "joint.yaml"
    whole = ("--dtype", "float32")
    learnt = extracted(run_directory / "recipe.yaml", tmp_path / "c", *whole, "--checkpoint", str(run_directory))
    cases = {
        "generate": (joint, generated),
        "prefix": (tmp_path / "prefix.yaml", extracted(tmp_path / "prefix.yaml", tmp_path / "a", *whole)),
        "half": (joint, extracted(joint, tmp_path / "b")),
        "checkpoint": (run_directory, learnt),
    }
    found = run_ranks(
        "compared",
        2,
        tmp_path,
        module="tests.tools.work_extract",
        deepspeed=False,
        cases={name: {"joint": str(a), "features": str(b)} for name, (a, b) in cases.items()},
    )
    for name, case in found.items():
        spread = case["spread"]
        assert case["largest"] < (0.02 * spread if name == "half" else min(1e-3 * spread, 1e-5 * max(spread, 1))), found
    assert found["half"]["largest"] > found["generate"]["largest"]  # it was rounded
    assert load_info(learnt).features["checkpoint"] is not None  # type: ignore[index]
    assert load_info(learnt).features["weights"] != load_info(cases["prefix"][1]).features["weights"]  # type: ignore[index]


@pytest.mark.slow
def test_killed_and_continued_it_is_the_same_to_the_last_byte(world: World, generated: Path, tmp_path: Path) -> None:
    """Killed with some tars there, half of another, and one damaged; continued by another number of ranks."""
    words = (world.folder / "joint.yaml", tmp_path / "out", *SMALL, "--dtype", "float32")
    place = Extraction(tmp_path / "out", 4)
    with started("extract", *words, "--ranks", "1") as process:
        wait_until(lambda: len(list(place.partial.glob("*.done.json"))) > 2, process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for child in map(int, children):
            os.kill(child, signal.SIGKILL)
        process.communicate(timeout=60)
    ready = sorted(place.partial.glob("*.done.json"))
    assert 2 < len(ready) < 9 and not place.out.exists()
    (place.partial / ".train-000005.tar.12345678").write_bytes(b"half")
    damaged = ready[0].with_name(ready[0].name.removesuffix(".done.json"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    kept = ready[1].with_name(ready[1].name.removesuffix(".done.json"))
    before = kept.stat().st_mtime_ns
    other = run("extract", *words[:-1], "float16")
    assert errors(other.stderr) == [
        f'features.dtype: is "float16", but {place.partial} has "float32". Finish it with its own settings, or remove '
        f"{place.partial}."
    ]
    done = run("extract", *words, "--ranks", "2")
    assert done.returncode == 0, done.stderr
    assert contents(place.out) == contents(generated)
    assert (place.out / kept.name).stat().st_mtime_ns == before  # it was not made again
    assert not place.partial.exists()


@pytest.mark.slow
def test_what_is_there_is_not_made_again_and_nothing_stale_is_read(
    world: World, generated: Path, tmp_path: Path
) -> None:
    """The command, training and evaluation name the entries that differ."""
    joint = world.folder / "joint.yaml"
    again = run("extract", joint, generated, *SMALL, "--dtype", "float32")
    assert again.returncode == 0 and "already" in again.stdout
    other = run("extract", joint, generated, *SMALL, "text.layers=1", "simulation.prompt=Speak up")
    told = "\n".join(errors(other.stderr))
    assert other.returncode == 2 and len(errors(other.stderr)) == 3
    assert 'features.simulation.prompt: is "Speak up", but' in told and "features.text.layers: is 1, but" in told

    data = shutil.copytree(generated, tmp_path / "data")
    made = offline(data, world.recipe(), data={"features": {"simulation": {"rollout": "generate"}}})
    write_recipe(made, tmp_path / "offline.yaml")
    output = tmp_path / "run"
    done = run("train", tmp_path / "offline.yaml", "--output", output, "--ranks", "2")
    assert done.returncode == 0, done.stderr
    assert not (output / "tokenizer").exists() and (output / "report.html").is_file()
    assert json.loads((output / "plan.json").read_text())["measured"] is not None
    rows = json.loads((output / "parameters.json").read_text())["rows"]
    assert {row["part"] for row in rows} == {"fusion", "imagination"}
    asked = ("train", tmp_path / "offline.yaml", "data.features.simulation.rollout=prefix", "--output", tmp_path / "no")
    refused = run(*asked)
    assert "data.features.simulation.rollout: is" in only_error(refused.returncode, refused.stderr)

    shutil.rmtree(data)
    extracted(joint, data, "--dtype", "float16")
    with pytest.raises(UserError, match="made in another way"):
        mix_info([Part("a", generated, 1.0), Part("b", data, 1.0)])
    for words in (("evaluate", output), ("train", output / "recipe.yaml", "training.epochs=2", "--output", output)):
        resume = ["--resume"] if words[0] == "train" else []
        stale = run(*words, *resume)
        assert 'data.features.dtype: is "float32", but' in only_error(stale.returncode, stale.stderr)


def test_the_features_are_shards_like_any(world: World, generated: Path) -> None:
    """Each clip has what it had before, features in place of what they come from, and its record."""
    verify(generated)
    for split, before in ((name, ShardedSplit(world.corpus, name)) for name in load_info(world.corpus).splits):
        after = ShardedSplit(generated, split)
        assert list(after.keys) == list(before.keys) and np.array_equal(after.labels, before.labels)
        for index in range(len(before)):
            old, new = before[index], after[index]
            assert new["text"] == old["text"] and after.record(index) == before.record(index)
            assert (new["vision"] is None) == (old["vision"] is None)
            assert old["vision"] is None or np.array_equal(new["vision"], old["vision"])
            assert (new["text_features"] is None) == (old["text"] is None)
            assert (new["audio"] is None) == (new["simulated"] is None) == (old["audio"] is None)
            if old["audio"] is not None:
                assert 1 <= len(new["simulated"]) <= 4 and new["audio"].shape[1] == 64


def test_clips_set_aside_are_left_out_and_named(world: World, tmp_path: Path) -> None:
    recipe = world.recipe(
        simulation={"rollout": "prefix"}, data={"on_bad_sample": "set_aside", "workers": 1}, audio={"max_seconds": 0.4}
    )
    write_recipe(recipe, tmp_path / "recipe.yaml")
    out = extracted(tmp_path / "recipe.yaml", tmp_path / "out")
    info, before = load_info(out), load_dataset(world.corpus)
    long = {
        key
        for indexes in before.indexes.values()
        for index in indexes
        for key, seconds in zip(index.columns.key, index.columns.audio_seconds, strict=True)
        if (seconds or 0) > 0.4
    }
    assert {aside.key for aside in info.set_aside} == long and 0 < len(long) < 34
    assert sum(part.samples for part in info.splits.values()) == 34 - len(long)
    assert "more than audio.max_seconds" in info.set_aside[0].reason
    assert flat(dict(info.features or {}))["audio.max_seconds"] == 0.4


def test_what_training_changes_is_not_extracted(world: World, tmp_path: Path) -> None:
    changed = world.recipe(
        audio={"tuning": "lora"}, text={"tuning": "lora"}, simulation={"projector": None}, data={"batch": 2}
    )
    found = {error.where: error for error in problems(changed, trained=False)}
    assert found.keys() == {"audio.tuning", "text.tuning", "simulation.projector"}
    assert all("--checkpoint" in error.remedy for error in found.values())
    assert list(problems(changed, trained=True)) == []
    assert [error.where for error in problems(offline(tmp_path, changed), trained=True)] == ["audio.input"]
    write_recipe(changed, tmp_path / "recipe.yaml")
    done = run("extract", tmp_path / "recipe.yaml", tmp_path / "out")
    assert {line.split(":")[0] for line in errors(done.stderr)} == found.keys() and done.returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_the_identity_holds_what_decides_values_and_nothing_else(world: World) -> None:
    plain = settings_of(world.recipe())
    same = world.recipe(data={"evaluation_batch": 9, "budget": {"audio_seconds": 99}}, seed=9, zero={"stage": 3})
    assert settings_of(same) == plain
    assert settings_of(world.recipe(simulation={"rollout": "cached"})) == plain
    for change in (
        {"simulation": {"beams": 2}},
        {"simulation": {"max_new_tokens": 5}},
        {"simulation": {"layer": -1}},
        {"simulation": {"rollout": "prefix"}},
        {"text": {"layers": 1}},
        {"audio": {"layer": -1}},
        {"precision": "bf16"},
    ):
        assert settings_of(world.recipe(**change)) != plain


def test_every_tar_is_dealt_once_and_evenly() -> None:
    rng = np.random.default_rng()
    pieces = [Piece("train", number, range(number, number + 1)) for number in range(int(rng.integers(1, 60)))]
    costs = rng.lognormal(size=len(pieces)).tolist()
    for ranks in (1, 2, 7):
        shares = deal(pieces, costs, ranks)
        assert sorted(piece.number for share in shares for piece in share) == list(range(len(pieces)))
        loads = [sum(costs[piece.number] for piece in share) for share in shares]
        assert max(loads) - min(loads) <= max(costs) + 1e-9


def test_half_precision_comes_back_as_float32_and_an_overflow_is_told(tmp_path: Path) -> None:
    values = np.random.default_rng().normal(size=(3, 4)).astype(np.float32)
    with write_dataset(
        tmp_path / "out", dims=Dims(text=4, simulated=4, vision=4), label_range=(-3, 3), samples_per_shard=9
    ) as writer:
        packed = pack_sample("a", 0.0, "train", text_features=values, simulated=values, vision=values, dtype=np.float16)
        writer.add("train", packed)
    sample = ShardedSplit(tmp_path / "out", "train")[0]
    for name in ("text_features", "simulated"):
        assert sample[name].dtype == np.float32
        assert np.array_equal(sample[name], values.astype(np.float16).astype(np.float32))
    assert np.array_equal(sample["vision"], values)


def test_the_plan_tells_what_features_take_and_when_they_pay(world: World, generated: Path) -> None:
    def told(recipe: Recipe) -> list[str]:
        recipe, corpus = corpus_of(recipe)
        planner = Planner(recipe, None, PROFILES["cpu"], 1, 2)
        load = load_of(recipe, corpus, 2)
        return caching(planner, corpus, predict_epoch(planner, load), load.steps)

    (note,) = told(world.recipe())
    assert "dist-train extract" in note and "it pays from" in note and "The projector then learns no more" in note
    (note,) = told(world.recipe(text={"tuning": "lora"}))
    assert "text.tuning is lora" in note and "Frozen is WavLM" in note
    trained = world.recipe(text={"tuning": "lora"}, audio={"tuning": "lora"})
    assert told(trained) == told(offline(generated, trained)) == []
    foretold = feature_lengths(*corpus_of(world.recipe()))
    made = ShardedSplit(generated, "train").columns
    for name in ("audio_frames", "text_frames", "simulated_frames"):
        pairs = list(zip(getattr(foretold, name), getattr(made, name), strict=True))
        assert all((a > 0) == (b is not None) for a, b in pairs), name
        if name == "audio_frames":
            assert all(b is None or abs(a - b) <= 1 for a, b in pairs)
