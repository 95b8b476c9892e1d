from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, WavLMConfig, WavLMModel

from dist_train.build import build_model, fit_to_dataset, prepare_tokenizer
from sharding.errors import UserError
from sharding.shard_writer import pack_sample, write_dataset
from sharding.shards import Dims
from tests import tiny


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus") / "shards")


def test_widths_come_from_the_dataset(shards: Path, tmp_path: Path) -> None:
    widths = fit_to_dataset(tiny.recipe(shards)).widths
    assert (widths.audio, widths.text, widths.vision) == (1, 1, tiny.VISION_WIDTH)
    dims = Dims(audio=7, text=4, vision=3)
    with write_dataset(tmp_path / "features", dims=dims, label_range=(-3.0, 3.0), samples_per_shard=8) as writer:
        arrays: dict[str, Any] = {
            name: np.zeros((2, width), np.float32) for name, width in (("audio", 7), ("vision", 3))
        }
        text = np.zeros((2, 4), np.float32)
        for split in ("train", "valid"):
            packed = pack_sample(key=split, split=split, label=0.0, text=None, text_features=text, **arrays)
            writer.add(split, packed)
    made = tiny.recipe(tmp_path / "features", audio={"input": "features"}, text={"input": "features"})
    widths = fit_to_dataset(made).widths
    assert (widths.audio, widths.text, widths.vision) == (7, 4, 3)
    with pytest.raises(UserError, match=r"audio\.input: is waveform.*Write audio\.input: features"):
        fit_to_dataset(tiny.recipe(tmp_path / "features"))


def test_a_stream_the_dataset_does_not_have_is_named(shards: Path) -> None:
    with pytest.raises(UserError, match=r"audio\.input: is features.*Write audio\.input: waveform"):
        fit_to_dataset(tiny.recipe(shards, audio={"input": "features"}))
    with pytest.raises(UserError, match=r"text\.input: is features.*Write text\.input: transcript"):
        fit_to_dataset(tiny.recipe(shards, text={"input": "features"}))


def test_the_tokenizer_of_a_run_is_learnt_or_the_named_one(shards: Path, tmp_path: Path) -> None:
    prepare_tokenizer(tiny.recipe(shards), tmp_path / "own")
    own = AutoTokenizer.from_pretrained(tmp_path / "own")
    assert len(own) == 300
    prepare_tokenizer(tiny.recipe(shards, text={"tokenizer": str(tmp_path / "own")}), tmp_path / "named")
    named = AutoTokenizer.from_pretrained(tmp_path / "named")
    assert named("really awful").input_ids == own("really awful").input_ids
    prepare_tokenizer(tiny.recipe(shards, text={"vocabulary": 310}), tmp_path / "named")  # what was there is replaced
    assert len(AutoTokenizer.from_pretrained(tmp_path / "named")) > 300


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a tiny fp32 WavLM and Llama, in several files."""
    folder, made = tmp_path_factory.mktemp("pretrained"), tiny.recipe(Path("none"))
    wide = {"hidden_size": 64, "intermediate_size": 64}
    WavLMModel(WavLMConfig(**(made.audio.config or {}))).save_pretrained(folder / "audio")
    llama = LlamaForCausalLM(LlamaConfig(**{**(made.text.config or {}), **wide}, vocab_size=320))
    llama.save_pretrained(folder / "text", max_shard_size="100KB")
    assert len(list((folder / "text").glob("*.safetensors"))) > 2
    return {"audio": folder / "audio", "text": folder / "text"}


@pytest.mark.parametrize("tuning", ["lora", "dora", "vera"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_a_model_is_built_in_the_precision_of_the_recipe(
    tuning: str, precision: str, quantisation: str, pretrained: dict[str, Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    recipe = tiny.recipe(
        Path("none"),
        precision=precision,
        audio={"pretrained": str(pretrained["audio"]), "config": None, "tuning": tuning},
        text={"pretrained": str(pretrained["text"]), "config": None, "tuning": tuning, "quantisation": quantisation},
    )
    model = build_model(recipe, tokenizer)
    kinds = {parameter.dtype for parameter in model.parameters()}
    assert kinds == {recipe.dtype} | ({torch.uint8} if quantisation == "nf4" else set())
    assert all(p.dtype == torch.float32 for name, p in model.named_buffers() if "inv_freq" in name)
    projections = [p for name, p in model.named_buffers() if "vera_" in name]
    assert bool(projections) == (tuning == "vera") and all(p.dtype == recipe.dtype for p in projections)
    original = LlamaForCausalLM.from_pretrained(pretrained["text"], dtype=torch.float32)
    embeddings: Any = model.llm.causal.get_input_embeddings()
    expected: Any = original.get_input_embeddings()
    assert torch.equal(embeddings.weight, expected.weight.to(recipe.dtype))
    again = build_model(recipe, tokenizer)
    for (name, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name
