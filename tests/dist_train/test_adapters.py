from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, WavLMConfig, WavLMModel

from dist_train.adapters import LoraSettings, apply_tuning
from sharding.errors import UserError
from tests import tiny


def wavlm() -> Any:
    return WavLMModel(WavLMConfig(**(tiny.recipe(Path("none")).audio.config or {}), apply_spec_augment=False))


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**(tiny.recipe(Path("none")).text.config or {}), vocab_size=50))


def run(model: Any) -> torch.Tensor:
    if isinstance(model, WavLMModel):
        return model(torch.randn(2, 4000)).last_hidden_state
    return model.get_decoder()(torch.randint(50, (2, 7))).last_hidden_state


@pytest.mark.parametrize(
    ("build", "targets"),
    [(wavlm, ["intermediate_dense", "output_dense"]), (llama, ["q_proj", "v_proj"]), (llama, ["mlp.down_proj"])],
)
def test_lora_trains_where_asked_and_only_there(build: Any, targets: list[str]) -> None:
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    wanted = {name for name in linear if any(name.endswith(target) for target in targets)}
    apply_tuning(model, "lora", LoraSettings(rank=3, target_modules=targets), where="part")

    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".lora_")[0] for name in trainable} == wanted
    assert len(trainable) == 2 * len(wanted)

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    run(model).square().sum().backward()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            assert parameter.shape[1] == 3
            assert parameter.grad.abs().sum() > 0
        elif "lora_A" not in name:
            assert parameter.grad is None
    optimizer.step()
    for name, value in model.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, before[name.replace(".base_layer", "")])
        elif "lora_B" in name:
            assert value.abs().sum() > 0


def test_an_untrained_adapter_changes_nothing_and_alpha_over_rank_scales_it() -> None:
    torch.manual_seed(0)
    model, tokens = llama(), torch.randint(50, (2, 7))
    decoder = model.get_decoder()
    plain = decoder(tokens).last_hidden_state
    apply_tuning(model, "lora", LoraSettings(rank=2, alpha=6, target_modules=["o_proj"]), where="text")
    assert torch.equal(decoder(tokens).last_hidden_state, plain)
    layer = decoder.layers[0].self_attn.o_proj
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(3, 16)
    update = x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 3 * update)


def test_full_and_frozen() -> None:
    for tuning, expected in (("full", True), ("frozen", False)):
        model = llama()
        apply_tuning(model, tuning, LoraSettings(), where="text")  # type: ignore[arg-type]
        assert {p.requires_grad for p in model.parameters()} == {expected}
        assert not any("lora" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "out_proj", "attention.q_proj"])
def test_targets_that_would_never_be_trained_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"^audio\.lora\.target_modules: {name}.*never.*output_dense") as caught:
        apply_tuning(wavlm(), "lora", LoraSettings(target_modules=["output_dense", name]), where="audio")
    assert name not in caught.value.remedy
    with pytest.raises(UserError, match=r"lm_head.*never"):
        apply_tuning(llama(), "lora", LoraSettings(target_modules=["lm_head"]), where="text")


def test_unknown_targets_are_named_with_the_choices() -> None:
    for targets in (["q_proj", "qproj"], ["qproj"], ["layers"], ["embed_tokens", "qproj"], ["proj"]):
        with pytest.raises(UserError, match=r"text\.lora\.target_modules.*Choose among down_proj, gate_proj") as caught:
            apply_tuning(llama(), "lora", LoraSettings(target_modules=targets), where="text")
        assert "q_proj:" not in str(caught.value) and targets[-1] in caught.value.problem
