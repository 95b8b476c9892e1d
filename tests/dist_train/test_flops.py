"""The arithmetic that MFU counts, against torch's counter on real steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerBase

from dist_train.build import build_collator, build_model, fit_to_dataset, open_split
from dist_train.flops import FlopRates, audio_of_step, flop_rates, matrix_rate, not_negative
from dist_train.foresight import Foresight
from dist_train.global_loss import pack
from dist_train.plan_corpus import corpus_of, load_of
from sharding.hardware import PROFILES
from sharding.order import EpochPlan
from tests import tiny

# WavLM's T² share is large at its width and these lengths, so both of its rates matter; that of the language model,
# which has one rate, is small as in models of real width.
WIDE = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4, "num_hidden_layers": 4}
CASES: dict[str, dict[str, Any]] = {
    "frozen WavLM, LoRA": {"audio": {"tuning": "frozen"}, "text": {"tuning": "lora"}},
    "full": {},
    "no rollout": {"simulation": {"rollout": "none"}, "text": {"tuning": "lora"}},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    seed = int(np.random.default_rng().integers(2**32))
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus") / "data", train=40, seed=seed)


@pytest.mark.parametrize("name", CASES)
def test_an_epoch_counts_what_torch_counts(name: str, corpus: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    changes = json.loads(json.dumps(CASES[name]))
    recipe = fit_to_dataset(tiny.recipe(corpus, **tiny.merge({"text": {"config": dict(WIDE)}}, changes)))
    model = build_model(recipe, tokenizer).train()
    split = open_split(recipe, "train")
    collate = build_collator(recipe, tokenizer, model)
    plan = EpochPlan(len(split), recipe.data.batch, 1, 1, seed=4, epoch=1)
    _, seen = corpus_of(recipe)
    load = load_of(recipe, seen, 1)
    rates = flop_rates(recipe, tokenizer, PROFILES["cpu"], [load.typical[0], load.worst, load.lightest])
    heard = np.round([(seconds or 0) * 16_000 for seconds in split.columns.audio_seconds])
    positions = np.maximum(heard, model.audio.minimum_samples)
    counted = estimated = 0.0
    for step in range(plan.steps):
        samples = [{**split[index], "index": index, "real": real} for index, real in plan.micro_batch(step, 0, 0)]
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            flows = model(collate(samples))
            rows = pack(flows, collate(samples)).rows
            (rows * torch.randn_like(rows)).sum().backward()
        counted += counter.get_total_flops()
        estimated += rates.of(audio_of_step(plan, step, positions), int(flows.passages))
    assert estimated == pytest.approx(counted, rel=0.03)


def test_recomputed_activations_do_not_count(corpus: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    recipe = fit_to_dataset(tiny.recipe(corpus, text={"config": dict(WIDE)}))
    _, seen = corpus_of(recipe)
    clips = load_of(recipe, seen, 1).typical
    again = recipe.model_copy(deep=True)
    again.text.activation_checkpointing = again.audio.activation_checkpointing = True
    plain, checkpointed = (flop_rates(one, tokenizer, PROFILES["cpu"], clips) for one in (recipe, again))
    assert checkpointed == plain


def test_rates_are_linear_in_what_they_count() -> None:
    rates = FlopRates(position=2.0, squared=3.0, passage=5.0)
    assert rates.of([(4, 10), (1, 7)], 11) == 2 * (40 + 7) + 3 * (400 + 49) + 5 * 11


@pytest.mark.parametrize("true", [(3.0, 0.5), (3.0, 0.0), (0.0, 0.5)])
def test_rates_are_found_and_never_negative(true: tuple[float, float]) -> None:
    rows = np.array([[800.0, 80_000.0], [900.0, 120_000.0], [905.0, 120_100.0]])
    assert not_negative(rows, rows @ true) == pytest.approx(true)
    noisy = rows @ true * np.array([1.0, 1.0, 1.02])  # two of like length that tell otherwise
    assert min(not_negative(rows, noisy)) >= 0


def test_a_resumed_run_keeps_what_was_measured_and_a_refusing_disk_ends_the_foresight_only(
    corpus: Path,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    world_of_one: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = fit_to_dataset(tiny.recipe(corpus))
    split = open_split(recipe, "train")
    plan = EpochPlan(len(split), 6, 1, 1, seed=0, epoch=0)

    def start() -> Foresight:
        return Foresight(recipe, tokenizer, split, 1, 1, tmp_path / "plan.json")

    first = start()
    with first.metered():
        torch.ones(3).add(1)
    first.compare(plan, 0, 3)
    again = start()
    measured = again.known()
    assert measured is not None and measured == first.known() and measured.step == 3

    again.path = tmp_path / "absent" / "plan.json"
    with again.metered():
        pass
    assert again.arithmetic(plan, 0, 10, 1.0)["mfu"]
    again.compare(plan, 1, 6)
    assert "no plan and no MFU" in " ".join(capsys.readouterr().err.split())
    assert again.arithmetic(plan, 0, 10, 1.0)["mfu"] is None
    again.close({})


def test_matrix_rate_is_that_of_this_device() -> None:
    assert 1e8 < matrix_rate(torch.float32, torch.device("cpu")) < 1e14


def test_a_model_that_cannot_be_planned_is_trained_all_the_same(
    corpus: Path, tmp_path: Path, world_of_one: None, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = fit_to_dataset(tiny.recipe(corpus))
    recipe.text.config, recipe.text.pretrained = None, str(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    split = open_split(recipe, "train")
    foresight = Foresight(recipe, None, split, 1, 1, tmp_path / "plan.json")
    told = " ".join(capsys.readouterr().err.split())
    assert "no plan and no MFU" in told and "is a gpt2 model, which cannot run packed" in told
    plan = EpochPlan(len(split), 6, 1, 1, seed=0, epoch=0)
    with foresight.metered():
        pass
    foresight.compare(plan, 0, 3)
    assert foresight.arithmetic(plan, 0, 10, 1.0) == {"flops": None, "mfu": None}
    foresight.close({})
    assert not (tmp_path / "plan.json").exists()
