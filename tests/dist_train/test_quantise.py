"""Quantised layers against their papers' arithmetic in float64, and what must stay as it is around them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dist_train.pretrained import load_model
from dist_train.quantise import check_quantised, loading_config, quantise
from sharding import checkpoint
from sharding.errors import UserError

KINDS = ["int8", "nf4"]
# arXiv 2305.14314 appendix E
NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], dtype=torch.float64,
)  # fmt: skip


def llama() -> Any:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 90}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4))


def one(kind: Any, weight: Tensor, bias: Tensor, threshold: float = 0.0, dtype: torch.dtype = torch.float32) -> Any:
    """A quantised layer of these weights."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data, layer.bias.data = weight.clone(), bias.clone()
    model = nn.Sequential(layer)
    quantise(model, kind, threshold, dtype, skip=set())
    return model[0]


def rounded(values: Tensor) -> Tensor:
    """LLM.int8 (arXiv 2208.07339 §2.1): each row in steps of its largest magnitude / 127."""
    step = values.double().abs().amax(1, keepdim=True) / 127
    return (values.double() / step).round() * step


def test_int8_multiplies_rounded_rows() -> None:
    """On a CPU bitsandbytes rounds the inputs in evaluation only."""
    weight, bias, x = torch.randn(40, 70).half().float(), torch.randn(40), torch.randn(9, 70).half().float()
    layer = one("int8", weight, bias)
    for training, seen in ((True, x.double()), (False, rounded(x))):
        expected = seen @ rounded(weight).T + bias.double()
        assert (layer.train(training)(x).double() - expected).norm() < 2e-3 * expected.norm()


def test_int8_multiplies_columns_above_the_threshold_exactly() -> None:
    weight, x = torch.randn(40, 70).half().float(), (torch.randn(9, 70) / 10).half().float()
    x[:, [3, 50]] *= 1000
    exact = x.double() @ rounded(weight).T
    error = [
        float((one("int8", weight, torch.zeros(40), threshold).eval()(x).double() - exact).norm())
        for threshold in (0.0, 6.0)
    ]
    assert error[1] < 0.1 * error[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_takes_the_nearest_level_of_its_block(dtype: torch.dtype) -> None:
    weight, bias = torch.randn(96, 64).to(dtype), torch.randn(96, dtype=dtype)
    layer = one("nf4", weight, bias, dtype=dtype)
    held = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    blocks = weight.double().reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = NF4[(blocks[..., None] / scale[..., None] - NF4).abs().argmin(-1)] * scale
    # The scales themselves are rounded to 8 bits, around their mean.
    spread = (scale - scale.mean()).abs().max()
    assert ((held.reshape(-1, 64) - nearest).abs() <= 0.04 * spread + 0.01 * scale).all()
    x = torch.randn(5, 64, dtype=dtype)
    expected = x.double() @ held.T + bias.double()
    found = layer(x)
    assert found.dtype == dtype
    assert (found.double() - expected).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_quantised_in_memory_equals_what_is_loaded_quantised(kind: Any, tmp_path: Path) -> None:
    model = llama()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = load_model(
        AutoModelForCausalLM, "text.pretrained", str(tmp_path), dtype=torch.bfloat16,
        quantization_config=loading_config(kind, 6.0, torch.bfloat16),
    )  # fmt: skip
    check_quantised(loaded, kind, where="text")
    quantise(model, kind, 6.0, torch.bfloat16, skip={"lm_head"})
    tokens = torch.randint(90, (2, 9))
    assert torch.equal(model.train()(tokens).logits, loaded.train()(tokens).logits)
    for other in (model, loaded):
        kinds = {name: type(layer).__name__ for name, layer in other.named_modules() if isinstance(layer, nn.Linear)}
        assert kinds.pop("lm_head") == "Linear"
        assert set(kinds.values()) == {"Linear8bitLt" if kind == "int8" else "Linear4bit"} and len(kinds) == 14
    assert checkpoint.fingerprints(model) == checkpoint.fingerprints(loaded)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_in_evaluation_changes_nothing(kind: Any) -> None:
    model = llama()
    quantise(model, kind, 6.0, torch.float32, skip={"lm_head"})
    tokens = torch.randint(90, (2, 9))
    check_quantised(model, kind, where="text")
    before = {name: value.clone() for name, value in model.named_parameters()}
    trained = model.train()(tokens).logits
    with torch.no_grad():
        evaluated = model.eval()(tokens).logits
    # int8 rounds the inputs too in evaluation.
    atol, rtol = (0.02, 0.05) if kind == "int8" else (1e-5, 1e-5)
    torch.testing.assert_close(evaluated, trained, atol=atol, rtol=rtol)
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name])
    model.train()(inputs_embeds=torch.randn(1, 3, 64, requires_grad=True)).logits.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_a_quantised_model_must_be_named_as_such(kind: Any, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "plain")
    config = loading_config(kind, 6.0, torch.float32)
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config).save_pretrained(
        tmp_path / "quantised"
    )
    model = load_model(AutoModelForCausalLM, "text.pretrained", str(tmp_path / "quantised"), dtype=torch.float32)
    check_quantised(model, kind, where="text")
    with pytest.raises(UserError, match=rf"text\.quantisation: is none.*quantised to {kind}.*Write.*{kind}"):
        check_quantised(model, "none", where="text")
    assert model(torch.randint(90, (1, 4))).logits.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_fingerprint_sees_the_scales(kind: Any) -> None:
    """Weights twice as large have the same codes."""
    model = llama()
    doubled = copy.deepcopy(model)
    for layer in doubled.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data *= 2
    doubled.lm_head.weight.data /= 2
    for each in (model, doubled):
        quantise(each, kind, 6.0, torch.float32, skip={"lm_head"})
    for (name, one_weight), other_weight in zip(model.named_parameters(), doubled.parameters(), strict=True):
        assert torch.equal(one_weight, other_weight), name
    for each in (model, doubled):
        each.requires_grad_(False)
    assert checkpoint.fingerprints(model) != checkpoint.fingerprints(doubled)
    assert checkpoint.fingerprints(model) == checkpoint.fingerprints(copy.deepcopy(model))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_stores_nothing_of_quantised_layers(kind: Any) -> None:
    model = llama()
    model.register_buffer("kept", torch.ones(1))
    quantise(model, kind, 6.0, torch.float32, skip={"lm_head"})
    assert checkpoint.buffers(model).keys() == {"kept"}
    model(torch.randint(90, (1, 4)))
    assert checkpoint.buffers(model).keys() == {"kept"}


def test_widths_that_bitsandbytes_gets_wrong_on_a_cpu_are_refused() -> None:
    weight = torch.randn(64, 96) * torch.logspace(-2, 1, 64)[:, None]
    model = nn.ModuleDict({"good": nn.Linear(128, 3), "odd": nn.Linear(96, 64)})
    model["odd"].weight = nn.Parameter(weight.clone())
    quantise(model, "nf4", 0.0, torch.float32, skip=set())
    held: Any = model["odd"].weight
    read = bitsandbytes.functional.dequantize_4bit(held.data, held.quant_state)
    assert (read - weight).norm() > 0.5 * weight.norm(), "bitsandbytes was repaired: drop the check"
    with pytest.raises(UserError, match=r"audio\.quantisation: is nf4.*multiple of 64.*odd has 96.*int8"):
        check_quantised(model, "nf4", where="audio")
