"""Bad samples, damaged runs and failing disks as real ranks meet them: one line, no traceback, no hang."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_train.evaluate import find_checkpoint, load_trained
from dist_train.recipe import load_recipe
from dist_train.run_directory import RunDirectory
from sharding.errors import UserError, UserErrors
from sharding.portable import Portable
from sharding.shard_writer import pack_sample, write_dataset
from sharding.shards import Dims, Split, load_dataset
from sharding.shuffle import permutation
from tests import tiny
from tests.corpus import read_only, small_disk
from tests.end_to_end.commands import (
    REFUSED,
    errors,
    metrics,
    only_error,
    refusal,
    run,
    started,
    wait_until,
)


def corrupt_sample(corpus: Path, folder: Path) -> tuple[Path, str]:
    """A copy with one flipped byte in a training sample, and that sample's key."""
    copy = Path(shutil.copytree(corpus, folder / "corrupt"))
    index = load_dataset(copy).indexes["train"][1]
    data = bytearray((copy / index.tar).read_bytes())
    data[index.columns.offset[3] + 700] ^= 255
    (copy / index.tar).write_bytes(data)
    return copy, index.columns.key[3]


def test_corrupt_sample_stops_training(corpus: Path, recipe: Path, tmp_path: Path) -> None:
    data, key = corrupt_sample(corpus, tmp_path)
    line = refusal("train", recipe, f"data.path={data}", "--output", tmp_path / "run", "--ranks", "2")
    assert f"sample {key}" in line and "train-000001.tar" in line and "checksum" in line
    assert not (tmp_path / "run/summary.json").exists()


def long_corpus(folder: Path, *, train: Collection[int] = (), valid: Collection[int] = ()) -> Path:
    """13 training, 4 validation and 4 test clips, of which the numbered ones have 10,000 words."""
    rng = np.random.default_rng(1)
    dims = Dims(audio="waveform", vision=tiny.VISION_WIDTH)
    with write_dataset(folder / "long", dims=dims, label_range=(-3, 3), samples_per_shard=8) as writer:
        plan: list[tuple[Split, int, Collection[int]]] = [("train", 13, train), ("valid", 4, valid), ("test", 4, ())]
        for split, count, long in plan:
            for i in range(count):
                clip = tiny.clip(rng) | ({"text": "film " * 10_000} if i in long else {})
                writer.add(split, pack_sample(key=f"{split}{i:03d}", split=split, **clip))
    return folder / "long"


def test_bad_clips_are_set_aside_and_counted_over_all_ranks(recipe: Path, tmp_path: Path) -> None:
    """Among them all clips of a step, so that no rank has anything to learn from in it."""
    orders = [permutation(13, seed=3, epoch=epoch).tolist() for epoch in (0, 1)]
    steps = [order[start : start + 3] for order in orders for start in range(0, 13, 3)]
    long = next(clips for clips in steps if 11 not in clips)
    data, key = corrupt_sample(long_corpus(tmp_path, train=long, valid=[1]), tmp_path)
    assert key == "train011"
    empty = [number for number, clips in enumerate(steps, 1) if {*long, 11}.issuperset(clips)]
    changes = [f"data.path={data}", "data.on_bad_sample=set_aside", "data.batch=3"]
    changes += ["training.epochs=2", "data.workers=1"]
    done = run("train", recipe, *changes, "--output", tmp_path / "run", "--ranks", "2")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["set_aside"] == 4  # of training, each once although seen in two epochs
    assert all(name in " ".join(summary["notes"]) for name in (key, *(f"train{i:03d}" for i in long)))
    (aside,) = summary["valid"]["set_aside"]
    assert "valid001" in aside and "tokens" in aside and summary["valid"]["clips"] == 3
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["step"] for row in rows if not any("loss/" in name for name in row)] == empty
    losses = [row["loss"] for row in rows if row["step"] not in empty]
    assert np.isfinite(losses).all() and all(losses)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["stop", "set_aside"])
def test_shards_that_are_cut_or_vanish_while_training(policy: str, recipe: Path, corpus: Path, tmp_path: Path) -> None:
    """By recipe the run stops, or goes on without those clips and counts them; it never waits for them."""
    data, output = Path(shutil.copytree(corpus, tmp_path / "shards")), tmp_path / "run"
    changes = [f"data.path={data}", f"data.on_bad_sample={policy}", "data.workers=1", "training.epochs=8"]
    with started("train", recipe, *changes, "--output", output, "--ranks", "2") as process:
        wait_until((output / "checkpoints/last").exists, process)
        (data / "train-000000.tar").unlink()
        os.truncate(data / "train-000001.tar", 3000)
        printed = process.communicate(timeout=150)[1]
    assert "Traceback" not in printed, printed
    if policy == "stop":
        assert process.returncode == REFUSED
        assert any(
            "train-00000" in line and ("cannot be opened" in line or "checksum" in line) for line in errors(printed)
        )
        return
    assert process.returncode == 0, printed
    summary = json.loads((output / "summary.json").read_text())
    assert 8 < summary["set_aside"] <= 16 and "Training clips set aside" in " ".join(summary["notes"])


@pytest.mark.slow
@pytest.mark.parametrize(("split", "clips"), [("train", 13), ("valid", 4)])
def test_a_split_of_which_no_clip_is_left_stops_training(split: str, clips: int, recipe: Path, tmp_path: Path) -> None:
    data = long_corpus(tmp_path, **{split: range(clips)})
    changes = [f"data.path={data}", "data.on_bad_sample=set_aside"]
    line = refusal("train", recipe, *changes, "--output", tmp_path / "run", "--ranks", "2")
    assert f"split {split}: has no clip" in line and not (tmp_path / "run/summary.json").exists()


@pytest.mark.slow
def test_an_encoder_without_transformer_layers_trains(recipe: Path, tmp_path: Path) -> None:
    """Nothing reads beyond its convolutions, whose output is state 0."""
    changes = ["audio.layer=0", "simulation.rollout=none"]
    done = run("train", recipe, *changes, "--output", tmp_path / "run", "--ranks", "2")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert len(metrics(tmp_path / "run")) == 4


@pytest.mark.slow
def test_long_text_stops_training(recipe: Path, tmp_path: Path) -> None:
    data = long_corpus(tmp_path, train=[3, 4])
    line = refusal("train", recipe, f"data.path={data}", "--output", tmp_path / "run", "--ranks", "2")
    assert "sample train00" in line and "tokens" in line and "text.max_tokens" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "ranks", "expected"),
    [
        ("training.epoch=3", 2, "training.epochs?"),
        ("data.path=/nowhere", 2, "/nowhere: is not a shard directory"),
        ("data.path=novalid", 1, "has no split 'valid'"),
    ],
)
def test_what_cannot_be_trained(change: str, ranks: int, expected: str, recipe: Path, tmp_path: Path) -> None:
    tiny.write_corpus(tmp_path / "novalid", valid=0)
    before = set(tmp_path.iterdir())
    word = change.replace("=novalid", f"={tmp_path}/novalid")
    assert expected in refusal("train", recipe, word, "--output", tmp_path / "new/run", "--ranks", str(ranks))
    assert set(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_resume_with_another_recipe_names_the_differences(recipe: Path, finished: Path) -> None:
    changes = ["optimizer.learning_rate=2e-3", "seed=4"]
    done = run("train", recipe, *changes, "--output", finished, "--ranks", "2", "--resume")
    assert done.returncode == REFUSED and "Traceback" not in done.stderr
    assert [line.split(":")[0] for line in errors(done.stderr)] == ["optimizer.learning_rate", "seed"]


@pytest.mark.slow
def test_a_run_that_failed_before_it_saved_starts_anew_where_it_is(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    wrong = run("train", recipe, "simulation.projector=/not/there", "--output", output, "--ranks", "2")
    assert wrong.returncode == REFUSED and "simulation.projector" in wrong.stderr and output.is_dir()
    again = run("train", recipe, "training.epochs=1", "--output", output, "--ranks", "2", "--resume")
    assert again.returncode == 0, again.stderr
    assert "Nothing was saved yet" in again.stdout and (output / "summary.json").is_file()


DAMAGE = {
    "truncated weights": "model-00001-of-00002.safetensors: is missing or damaged",
    "no manifest": "is not a complete checkpoint",
    "empty manifest": "is not a complete checkpoint",
    "no checkpoints": "is not a checkpoint",
    "no tokenizer": "tokenizer",
}


def damaged(finished: Path, folder: Path, how: str) -> Path:
    """A copy of a run, damaged."""
    copy = Path(shutil.copytree(finished, folder / "copy", symlinks=True))
    best = copy / "checkpoints/best"
    if how == "truncated weights":
        os.truncate(best / "model-00001-of-00002.safetensors", 1000)
    elif how == "no manifest":
        (best / "manifest.json").unlink()
    elif how == "empty manifest":
        (best / "manifest.json").write_text("{}")
    else:
        shutil.rmtree(copy / how.removeprefix("no "))
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("how", DAMAGE)
def test_damage_of_a_run_is_told_before_it_is_evaluated(how: str, finished: Path, tmp_path: Path) -> None:
    run = RunDirectory(damaged(finished, tmp_path, how))
    with pytest.raises(UserError, match=DAMAGE[how]) as caught:
        load_trained(run, load_recipe(run.recipe), find_checkpoint(run, "best"))
    assert str(run.path) in str(caught.value)


@pytest.mark.slow
def test_another_frozen_base_is_refused_unless_it_is_meant(finished: Path) -> None:
    """The language model's head is frozen; another seed makes another one."""
    run = RunDirectory(finished)
    other = load_recipe(run.recipe, ["seed=4"])
    best = find_checkpoint(run, "best")
    with pytest.raises(UserErrors, match=r"other frozen weights of text\.pretrained .* --accept-other-base"):
        load_trained(run, other, best)
    model, _ = load_trained(run, other, best, accept_other_base=True)
    trained = dict(Portable(best).tensors("model"))
    assert trained and all(torch.equal(value, model.state_dict()[name]) for name, value in trained.items())


@pytest.mark.slow
def test_evaluating_what_cannot_be_evaluated(finished: Path, tmp_path: Path) -> None:
    copy = damaged(finished, tmp_path, "truncated weights")
    line = refusal("evaluate", copy, "--ranks", "1")
    assert DAMAGE["truncated weights"] in line and str(copy) in line
    line = refusal("evaluate", finished, "--ranks", "1", "--split", "dev")
    assert "shards: has no split 'dev'" in line


@pytest.mark.slow
def test_full_disk_while_saving_then_resume(recipe: Path, tmp_path: Path) -> None:
    """Room for one checkpoint; later for more."""
    epochs = "training.epochs=3"
    with small_disk(tmp_path / "disk", 3_000_000) as disk:
        line = refusal("train", recipe, epochs, "--output", disk / "run", "--ranks", "2")
        assert "step_00000008" in line and "No space left" in line and "--resume" in line
        assert [path.name for path in (disk / "run/checkpoints").glob("step_*")] == ["step_00000004"]
        shutil.copytree(disk / "run", tmp_path / "moved", symlinks=True)
    done = run("train", recipe, epochs, "--output", tmp_path / "moved", "--ranks", "2", "--resume")
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in metrics(tmp_path / "moved")] == list(range(1, 13))


@pytest.mark.slow
def test_disk_filled_by_others_while_training_then_resume(recipe: Path, tmp_path: Path) -> None:
    """Not even a line of metrics fits."""
    with small_disk(tmp_path / "disk", 8_000_000) as disk:
        output = disk / "run"
        with started("train", recipe, "training.epochs=900", "--output", output, "--ranks", "2") as process:
            wait_until((output / "checkpoints/last").exists, process)
            with (disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="space"):
                while True:
                    filler.write(bytes(4096))
            printed = process.communicate(timeout=100)[1]
        assert process.returncode == REFUSED and "Traceback" not in printed, printed
        assert "--resume" in errors(printed)[0]
        state = json.loads((output / "checkpoints/last/state.json").read_text())
        shutil.copytree(output, tmp_path / "moved", symlinks=True)
    epochs = state["progress"]["epoch"] + 1
    changes = f"training.epochs={epochs}"
    done = run("train", recipe, changes, "--output", tmp_path / "moved", "--ranks", "2", "--resume")
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in metrics(tmp_path / "moved")] == list(range(1, 4 * epochs + 1))


@pytest.mark.slow
def test_checkpoints_made_read_only_while_training(recipe: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "run/checkpoints"
    with started("train", recipe, "training.epochs=900", "--output", tmp_path / "run", "--ranks", "2") as process:
        wait_until((checkpoints / "last").exists, process)
        with read_only(checkpoints):
            printed = process.communicate(timeout=100)[1]
    line = only_error(process.returncode, printed)
    assert "checkpoints/step_" in line and "cannot be written" in line and "--resume" in line
    step = Portable(checkpoints / "last").state["progress"]["step"]  # whole: its checksums are right
    assert step <= metrics(tmp_path / "run")[-1]["step"] <= step + 4
    assert not list(checkpoints.glob("*.writing"))
