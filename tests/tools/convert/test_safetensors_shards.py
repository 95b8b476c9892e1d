"""Our safetensors files against safetensors' own reader and against transformers' writer."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tools.convert.held import Tensors
from tools.convert.safetensors_shards import BUFFER, NAMES, PIECE, write_shards


def held(values: dict[str, Tensor]) -> Tensors:
    shapes = {name: list(value.shape) for name, value in values.items()}
    return Tensors(shapes, {name: value.dtype for name, value in values.items()}, values.__getitem__)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(list(NAMES))), min_size=1, max_size=8),
    st.integers(1, 200),
    st.integers(0, 2**31),
)
def test_what_is_read_back(kinds: list[tuple[list[int], torch.dtype]], shard_bytes: int, seed: int) -> None:
    torch.manual_seed(seed)
    values = {f"part.{n}": (torch.randn(shape) * 9).to(dtype) for n, (shape, dtype) in enumerate(kinds)}
    seen: dict[str, int] = {}
    with TemporaryDirectory() as folder:
        files = write_shards(Path(folder), held(values), shard_bytes=shard_bytes, on_tensor=seen.__setitem__)
        found: dict[str, Tensor] = {}
        for file in files:
            if file.suffix == ".safetensors":
                part = load_file(file)
                assert len(part) == 1 or sum(value.nbytes for value in part.values()) <= shard_bytes
                assert not part.keys() & found.keys()
                found.update(part)
        if len(files) > 1:
            index = json.loads(files[-1].read_text())
            assert index["weight_map"].keys() == values.keys()
            assert {file.name for file in files[:-1]} == set(index["weight_map"].values())
    assert seen == {name: value.nbytes for name, value in values.items()}
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert found[name].flatten().view(torch.uint8).tolist() == value.flatten().view(torch.uint8).tolist()


def test_a_folder_that_transformers_loads(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    config.save_pretrained(tmp_path)
    files = write_shards(tmp_path, held(model.state_dict()), dtype=torch.bfloat16, shard_bytes=3000)
    assert len(files) > 3
    found: Any = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    loaded, report = found
    assert not any(report.values())
    model.bfloat16().save_pretrained(tmp_path / "theirs", max_shard_size="3KB")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.bfloat16)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name])


@pytest.mark.parametrize("size", [PIECE - 1, PIECE, PIECE + 1, BUFFER // 2, BUFFER + 3, 3 * BUFFER + 7])
def test_large_tensors_are_cast_piece_by_piece(size: int, tmp_path: Path) -> None:
    value, more = torch.randn(size), torch.randint(2**60, (BUFFER // 5,))
    write_shards(tmp_path, held({"a": value.view(1, -1), "b": more}), dtype=torch.bfloat16)
    found = load_file(tmp_path / "model.safetensors")
    assert torch.equal(found["a"], value.bfloat16().view(1, -1)) and torch.equal(found["b"], more)


def test_a_tensor_that_is_not_what_was_said(tmp_path: Path) -> None:
    wrong = Tensors({"a": [2]}, {"a": torch.float32}, lambda name: torch.zeros(3))
    with pytest.raises(ValueError, match=r"a was said to be torch\.float32 \[2\]"):
        write_shards(tmp_path, wrong)
