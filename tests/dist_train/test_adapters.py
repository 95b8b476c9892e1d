"""Adapters train where they are asked to and only there, and compute what their papers say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dist_train.adapters import TuningSettings, apply_tuning, cast_projections
from dist_train.audio import build_encoder
from sharding.errors import UserError
from tests import tiny

ADAPTERS = ["lora", "dora", "vera"]
PER_LAYER = {"lora": 2, "dora": 3, "vera": 2}  # trained tensors


def wavlm() -> Any:
    return build_encoder(tiny.recipe(Path("none")).audio)


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**(tiny.recipe(Path("none")).text.config or {}), vocab_size=50))


def run(model: Any) -> torch.Tensor:
    if isinstance(model, LlamaForCausalLM):
        return model.get_decoder()(torch.randint(50, (2, 7))).last_hidden_state
    return model(torch.randn(2, 4000)).last_hidden_state


def tuning(kind: str, **settings: Any) -> TuningSettings:
    return TuningSettings.model_validate({"tuning": kind, kind: settings})


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize(
    ("build", "targets", "expected"),
    [
        (wavlm, ["intermediate_dense", "output_dense"], None),
        (wavlm, None, ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.out_proj"]),
        (llama, ["q_proj", "v_proj"], None),
        (llama, ["mlp.down_proj"], None),
        (llama, None, ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]),
    ],
)
def test_an_adapter_trains_where_asked_and_only_there(
    kind: str, build: Any, targets: list[str] | None, expected: list[str] | None
) -> None:
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    wanted = {name for name in linear if any(name.endswith(target) for target in expected or targets or [])}
    apply_tuning(model, tuning(kind, rank=3, target_modules=targets), where="part")

    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".lora_")[0].split(".vera_")[0] for name in trainable} == wanted
    assert len(trainable) == PER_LAYER[kind] * len(wanted) > 0

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        run(model).square().sum().backward()
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                assert parameter.grad is None
            elif step == 1 or not ("lora_A" in name or "lambda_d" in name):  # a zero partner multiplies these at first
                assert parameter.grad.abs().sum() > 0, name
        optimizer.step()
    for name, value in model.state_dict().items():
        if name not in trainable:
            assert torch.equal(value, before[name.replace(".base_layer", "")])


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_untrained_adapter_changes_nothing(kind: str) -> None:
    for build in (llama, wavlm):
        model = build().eval()
        torch.manual_seed(0)
        plain = run(model)
        apply_tuning(model, tuning(kind, rank=5), where="part")
        torch.manual_seed(0)
        torch.testing.assert_close(run(model), plain, atol=1e-5, rtol=1e-5)


def adapted(kind: str, **settings: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """One layer with random adapter weights, its frozen weight, and inputs."""
    model = llama()
    apply_tuning(model, tuning(kind, target_modules=["down_proj"], **settings), where="text")
    layer = model.get_decoder().layers[1].mlp.down_proj
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            nn.init.normal_(parameter)
    return layer, layer.base_layer.weight.double(), torch.randn(3, 24)


def test_lora_adds_alpha_over_rank_times_b_a() -> None:
    layer, weight, x = adapted("lora", rank=2, alpha=6)
    update = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    torch.testing.assert_close(layer(x).double(), x.double() @ (weight + 3 * update).T, atol=1e-4, rtol=1e-4)


def test_dora_sets_the_length_of_each_row_of_the_adapted_weight() -> None:
    """arXiv 2402.09353 eq. 5: W' = m (W + BA) / ‖W + BA‖, one length per output."""
    layer, weight, x = adapted("dora", rank=2, alpha=6)
    direction = weight + 3 * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    length = layer.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(length.double(), weight.norm(dim=1), atol=1e-5, rtol=1e-5)  # where it starts
    nn.init.uniform_(length, 0.5, 2)
    expected = length.double()[:, None] * direction / direction.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer(x).double(), x.double() @ expected.T, atol=1e-4, rtol=1e-4)


def test_vera_scales_shared_projections() -> None:
    """arXiv 2310.11454 eq. 2: W x + Λ_b B Λ_d A x, the same random A and B in every layer, cut to its size."""
    layer, weight, x = adapted("vera", rank=4)
    a, b = (part["default"].double() for part in (layer.vera_A, layer.vera_B))
    d, scale = layer.vera_lambda_d["default"].double(), layer.vera_lambda_b["default"].double()
    update = scale[:, None] * b[:16] @ (d[:, None] * a[:, :24])
    torch.testing.assert_close(layer(x).double(), x.double() @ (weight + update).T, atol=1e-4, rtol=1e-4)


def test_the_projections_of_vera_are_drawn_from_their_seed_and_not_stored() -> None:
    def projections(seed: int, **settings: Any) -> tuple[Any, Any]:
        model = llama()
        apply_tuning(model, tuning("vera", rank=6, projection_seed=seed, **settings), where="text")
        assert not any("vera_A" in name or "vera_B" in name for name in model.state_dict())
        layers = [layer.self_attn.q_proj for layer in model.get_decoder().layers]
        assert all(layer.vera_A is layers[0].vera_A and layer.vera_B is layers[0].vera_B for layer in layers)
        assert {float(layer.vera_lambda_d["default"].min()) for layer in layers} == {float(torch.tensor(0.3))}
        cast_projections(model, torch.bfloat16)
        return layers[0].vera_A["default"], layers[0].vera_B["default"]

    torch.manual_seed(1)
    first = projections(5, initial_scale=0.3)
    torch.manual_seed(2)
    again, other = projections(5, initial_scale=0.3), projections(6, initial_scale=0.3)
    assert first[0].dtype == torch.bfloat16
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("kind", ADAPTERS)
def test_dropout_acts_on_the_adapter_in_training_only(kind: str) -> None:
    layer, _, x = adapted(kind, rank=4, dropout=0.5)
    layer.train()
    assert not torch.allclose(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_full_and_frozen() -> None:
    for kind, expected in (("full", True), ("frozen", False)):
        model = llama()
        apply_tuning(model, TuningSettings.model_validate({"tuning": kind}), where="text")
        assert {p.requires_grad for p in model.parameters()} == {expected}
        assert not any("lora" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("kind", ADAPTERS)
def test_targets_that_would_never_be_trained_are_refused(kind: str) -> None:
    with pytest.raises(UserError, match=rf"^text\.{kind}\.target_modules: lm_head.*never") as caught:
        apply_tuning(llama(), tuning(kind, target_modules=["q_proj", "lm_head"]), where="text")
    assert "lm_head" not in caught.value.remedy


def test_unknown_targets_are_named_with_the_choices() -> None:
    for targets in (["q_proj", "qproj"], ["qproj"], ["layers"], ["embed_tokens", "qproj"], ["proj"]):
        with pytest.raises(UserError, match=r"text\.lora\.target_modules.*Choose among down_proj, gate_proj") as caught:
            apply_tuning(llama(), tuning("lora", target_modules=targets), where="text")
        assert "q_proj:" not in str(caught.value) and targets[-1] in caught.value.problem


def test_a_model_with_other_names_asks_for_targets() -> None:
    with pytest.raises(UserError, match=r"part\.vera\.target_modules.*q_proj.*Choose among first, last\."):
        apply_tuning(nn.ModuleDict({"first": nn.Linear(1, 1), "last": nn.Linear(1, 1)}), tuning("vera"), where="part")
