"""Frozen weights are mapped from their files once per node, and are the same on every rank."""

from __future__ import annotations

from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from dist_train.recipe import write_recipe
from tests import tiny
from tests.ranks import run_ranks


def test_ranks_share_the_pages_of_a_frozen_base(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    text = {"pretrained": str(tmp_path / "llm"), "config": None, "tuning": "lora"}
    corpus = tiny.write_corpus(tmp_path / "shards")
    write_recipe(tiny.recipe(corpus, text=text, precision="bf16"), tmp_path / "recipe.yaml")
    found = run_ranks(
        "frozen_pages",
        2,
        tmp_path,
        module="tests.dist_train.work_loading",
        recipe=str(tmp_path / "recipe.yaml"),
        tokenizer=str(tmp_path / "llm"),
    )
    assert [Path(one["file"]).name for one in found] == ["model.safetensors"] * 2
    assert [one["dirty"] for one in found] == [0, 0]


def test_ranks_with_other_frozen_weights_are_told(tmp_path: Path) -> None:
    told = run_ranks("other_bases", 2, tmp_path, module="tests.dist_train.work_loading")
    assert "other frozen weights on rank 1 than on rank 0" in told and told.startswith("text.pretrained")
