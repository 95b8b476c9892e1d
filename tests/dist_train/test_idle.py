"""Data without a modality, or a loss of weight 0, stops no run: what then gets no signal is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from dist_train.build import build_collator, build_model, fit_to_dataset, open_split, prepare_tokenizer
from dist_train.global_loss import global_loss, pack
from dist_train.idle import idle_parts
from sharding.census import Census
from sharding.errors import UserErrors
from sharding.order import EpochPlan
from sharding.shard_writer import pack_sample, write_dataset
from sharding.shards import Dims
from sharding.stream import stream
from tests import tiny
from tests.ranks import run_ranks

NOTHING: dict[str, Any] = {}


def corpus(folder: Path, **has: bool) -> Path:
    """Clips all of which lack the same modalities."""
    rng = np.random.default_rng()
    dims = Dims(audio="waveform", text=None, vision=tiny.VISION_WIDTH)
    with write_dataset(folder, dims=dims, label_range=(-3.0, 3.0), samples_per_shard=8) as writer:
        for split in ("train", "valid"):
            for i in range(8):
                writer.add(split, pack_sample(key=f"{split}{i}", split=split, **tiny.clip(rng, **has)))
    return folder


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize(
    ("has", "changes"),
    [(NOTHING, NOTHING), (NOTHING, {"loss": {"rnc": 0}}), ({"vision": False}, NOTHING), ({"text": False}, NOTHING),
     ({"audio": False}, NOTHING)],
)  # fmt: skip
def test_what_is_idle_is_excused_and_nothing_else(
    has: dict[str, bool], changes: dict[str, Any], tmp_path: Path
) -> None:
    recipe = fit_to_dataset(tiny.recipe(corpus(tmp_path / "shards", **has), **changes))
    prepare_tokenizer(recipe, tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    model, split = build_model(recipe, tokenizer).train(), open_split(recipe, "train")
    idle = idle_parts(recipe, split)
    assert bool(idle) == bool(has or changes)
    excusing, strict = Census(model, steps=2, excused=idle), Census(model, steps=2)
    batches = stream(split, EpochPlan(8, 4, 1, 1, seed=1, epoch=0), 0, build_collator(recipe, tokenizer, model))
    said = ""
    for step, batch in enumerate(batches):
        batch.pop("set_aside")
        packed = pack(model(batch), batch)
        global_loss([packed], recipe.loss).surrogate(0, packed).backward()
        excusing.after_backward(step)
        try:
            strict.after_backward(step)
        except UserErrors as errors:
            said = str(errors)
    assert not excusing.hooks and not strict.hooks
    assert ("got only zeros" in said) == bool(idle)


@pytest.mark.slow
def test_what_died_since_the_start_does_not_end_a_resumed_run(tmp_path: Path) -> None:
    """A requeued run would else never come back, for a unit that its undisturbed twin trains on without."""
    data = tiny.write_corpus(tmp_path / "data", train=48)
    ends = run_ranks("died", 1, tmp_path, module="tests.dist_train.work_systems", data=str(data))
    assert ends["resumed"] == "finished at step 8"
    assert "got only zeros as gradient" in ends["fresh"] and "fusion.rnc_head" in ends["fresh"]
