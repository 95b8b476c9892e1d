from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.masking_utils import sdpa_mask

from dist_train import packed
from dist_train.packed import LEAST_FILLED, NAME, Segments, TextStates, pack, spread, take

WIDTH = 32
SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
GROUPED = pytest.mark.parametrize("key_heads", [4, 2, 1])


def models(key_heads: int = 4, **changes: Any) -> tuple[Any, Any]:
    """The same random decoder twice: with packed attention, and as transformers makes it."""
    config = LlamaConfig(**{**SMALL, "num_key_value_heads": key_heads, **changes})
    stock = LlamaForCausalLM(config).train()
    with torch.no_grad():
        for parameter in stock.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.15)
    ours = LlamaForCausalLM(config).train()
    ours.load_state_dict(stock.state_dict())
    ours.set_attn_implementation(NAME)
    return ours, stock


def rows(lengths: list[int], width: int = WIDTH) -> list[Tensor]:
    return [torch.randn(length, width) for length in lengths]


def padded(parts: list[Tensor]) -> TextStates:
    """Padding holds large numbers that must not matter."""
    longest = max(len(part) for part in parts)
    states = torch.full((len(parts), longest, parts[0].shape[1]), 9.0)
    mask = torch.zeros(len(parts), longest, dtype=torch.bool)
    for row, part in enumerate(parts):
        states[row, : len(part)], mask[row, : len(part)] = part, True
    return TextStates(states, mask)


def run_packed(model: Any, blocks: list[TextStates]) -> list[Tensor]:
    """Hidden states [n, H] of all layers over the real positions of all blocks."""
    inputs, segments = pack(blocks)
    outputs = model.model(
        inputs_embeds=inputs,
        position_ids=segments.positions,
        attention_mask=inputs.new_empty(0, 0, 0, 0),
        segments=segments,
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states
    return [state[0] for state in outputs]


def run_padded(model: Any, block: TextStates) -> list[Tensor]:
    """The same of one block by an ordinary padded forward; rows without any position are left out of it."""
    kept = block.mask.any(1)
    if not kept.any():
        return [block.states.new_zeros(0, WIDTH)] * (SMALL["num_hidden_layers"] + 1)
    outputs = model.model(
        inputs_embeds=block.states[kept], attention_mask=block.mask[kept].long(), output_hidden_states=True
    ).hidden_states
    return [state[block.mask[kept]] for state in outputs]


ragged = st.lists(st.integers(0, 40), min_size=1, max_size=7)


@GROUPED
@settings(max_examples=25, deadline=None)
@given(batches=st.lists(ragged, min_size=1, max_size=3).filter(lambda batches: any(map(any, batches))))
def test_one_packed_pass_equals_separate_padded_forwards_of_the_stock_model(
    key_heads: int, batches: list[list[int]]
) -> None:
    """States of all layers, and gradients of inputs and weights, at equal losses."""
    ours, stock = models(key_heads)
    inputs = [[part.requires_grad_() for part in rows(lengths)] for lengths in batches]
    states = run_packed(ours, [padded(parts) for parts in inputs])
    apart = [run_padded(stock, padded(parts)) for parts in inputs]
    expected = [torch.cat(layer) for layer in zip(*apart, strict=True)]
    weights = [torch.randn_like(state) for state in expected]
    gradients = []
    for model, found in ((ours, states), (stock, expected)):
        for part in itertools.chain(*inputs):
            part.grad = None
        losses = [(state * weight).sum() / len(state) for state, weight in zip(found, weights, strict=True)]
        torch.stack(losses).sum().backward()
        reached = [p.grad for name, p in model.named_parameters() if name not in ("lm_head.weight", EMBEDDINGS)]
        gradients.append([*(part.grad for part in itertools.chain(*inputs) if len(part)), *reached])
    for found, wanted in zip(states + gradients[0], expected + gradients[1], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


EMBEDDINGS = "model.embed_tokens.weight"  # not used: the inputs are embedded


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [0, 1, 0], [0, 5, 0, 0, 1], [64], [13, 13]])
def test_empty_and_single_token_segments(lengths: list[int]) -> None:
    ours, stock = models()
    block = padded(rows(lengths))
    for found, wanted in zip(run_packed(ours, [block]), run_padded(stock, block), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@given(lengths=st.lists(st.integers(0, 300), min_size=1, max_size=60).filter(any))
def test_groups_hold_each_segment_once_with_little_padding(lengths: list[int]) -> None:
    segments = Segments(lengths, torch.device("cpu"))
    shapes, there, back = segments.groups
    assert sum(count for count, _ in shapes) == sum(length > 0 for length in lengths)
    assert torch.equal(there[back], torch.arange(sum(lengths)))  # there and back again
    assert len(there) == sum(count * width for count, width in shapes)
    assert len(there) <= sum(lengths) / LEAST_FILLED
    of = torch.repeat_interleave(torch.tensor(lengths))  # segment of each packed position
    at = 0
    for count, width in shapes:
        for row in there[at : at + count * width].view(count, width):
            length = lengths[of[row[0]]]
            assert of[row].unique().numel() == 1
            assert torch.equal(segments.positions[0][row], torch.arange(width).clamp(max=length - 1))
        at += count * width


@given(data=st.data(), shape=st.tuples(st.integers(1, 5), st.integers(1, 6)))
def test_take_and_spread_are_inverse(data: st.DataObject, shape: tuple[int, int]) -> None:
    flat = data.draw(st.lists(st.booleans(), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    mask, values = torch.tensor(flat).view(shape), torch.randn(*shape, 3)
    assert torch.equal(take(values, mask), values[mask])
    assert torch.equal(spread(take(values, mask), mask), values * mask[..., None])


@GROUPED
def test_without_segments_it_is_transformers_sdpa(key_heads: int) -> None:
    """Padding on both sides, a KV cache, beam search: whatever decoding asks for."""
    ours, stock = models(key_heads)
    ours.eval(), stock.eval()
    embeds, mask = torch.randn(3, 9, WIDTH), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = mask[1, 6:] = 0
    a, b = (model.model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state for model in (ours, stock))
    assert torch.equal(a, b)
    a, b = (model.model(inputs_embeds=embeds).last_hidden_state for model in (ours, stock))
    assert torch.equal(a, b)
    mask[1] = 1
    for beams in (1, 3):
        a, b = (
            m.generate(inputs_embeds=embeds, attention_mask=mask, num_beams=beams, max_new_tokens=8, do_sample=False)
            for m in (ours, stock)
        )
        assert torch.equal(a, b)


def test_no_mask_over_all_positions_is_ever_built(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = models()
    built = []

    def spy(**kwargs: Any) -> Any:
        built.append(kwargs)
        return sdpa_mask(**kwargs)

    monkeypatch.setitem(packed.AttentionMaskInterface._global_mapping, NAME, spy)
    run_packed(ours, [padded(rows([3, 8, 1]))])
    assert not built
    ours.model(inputs_embeds=torch.randn(2, 4, WIDTH), attention_mask=torch.ones(2, 4, dtype=torch.long))
    assert built  # the spy works


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_it_survives_activation_checkpointing(dropout: float) -> None:
    """Recomputation in the backward pass, with the same dropout."""
    ours, _ = models(2, attention_dropout=dropout)
    blocks = [padded(rows([5, 0, 30, 1, 17, 18]))]
    gradients, seen = [], []
    ours.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    for checkpoints in (False, True):
        if checkpoints:
            ours.gradient_checkpointing_enable({"use_reentrant": False})
        ours.zero_grad()
        torch.manual_seed(4)
        run_packed(ours, blocks)[-1].square().sum().backward()
        gradients.append({name: p.grad for name, p in ours.named_parameters() if p.grad is not None})
    assert len(seen) == 3  # once, then once and once again
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_bf16_is_as_near_to_the_truth_as_the_stock_model_is() -> None:
    ours, stock = models()
    block = padded(rows([5, 30, 1, 17]))
    truth = run_padded(stock, block)[-1]
    half = TextStates(block.states.bfloat16(), block.mask)
    errors = [
        (run(model.bfloat16(), *([[half]] if run is run_packed else [half]))[-1].float() - truth).norm() / truth.norm()
        for run, model in ((run_packed, ours), (run_padded, stock))
    ]
    assert errors[0] < 1.2 * errors[1] < 0.1


def reference(q: Tensor, k: Tensor, v: Tensor, offsets: list[int], scale: float, window: int | None = None) -> Tensor:
    """Causal attention of each segment by itself in float64; q [N, heads, D], k and v [N, key heads, D]."""
    shared = q.shape[1] // k.shape[1]
    k, v = k.double().repeat_interleave(shared, 1), v.double().repeat_interleave(shared, 1)
    outputs = []
    for start, end in itertools.pairwise(offsets):
        scores = torch.einsum("qhd,khd->hqk", q[start:end].double(), k[start:end]) * scale
        whole = torch.ones(end - start, end - start, dtype=torch.bool)
        unseen = (whole.triu(1) | whole.tril(-(window or end - start))).to(q.device)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(unseen, -torch.inf).softmax(-1), v[start:end]))
    return torch.cat(outputs).to(q.dtype)


def test_a_kernel_without_padding_gets_the_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn's calling convention, with arithmetic of our own in its place."""
    ours, stock = models(2)
    calls = []

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, segments: Segments, dropout: float, scaling: float | None, window: int | None
    ) -> Tensor:
        calls.append((segments.longest, segments.offsets.dtype, dropout, window))
        assert scaling is not None
        return reference(q, k, v, segments.offsets.tolist(), scaling)

    monkeypatch.setattr(packed, "varlen_kernel", lambda query, dropout, softcap: kernel)
    block = padded(rows([4, 0, 1, 11]))
    for found, wanted in zip(run_packed(ours, [block]), run_padded(stock, block), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert calls == [(11, torch.int32, 0.0, None)] * 3


def test_on_a_cpu_there_is_no_such_kernel() -> None:
    assert packed.varlen_kernel(torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16), 0.0) is None


@pytest.mark.gpu
@GROUPED
def test_the_kernels_of_a_gpu_agree_with_float64(key_heads: int) -> None:
    lengths = [7, 1, 0, 130, 64]
    offsets = Segments(lengths, torch.device("cuda"))
    q = torch.randn(sum(lengths), 4, 64, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, sum(lengths), key_heads, 64, device="cuda", dtype=torch.bfloat16)
    kernels = [kernel for kernel in (packed.flash_attn(), packed.torch_varlen()) if kernel is not None]
    assert kernels
    for kernel, window in itertools.product(kernels, (None, 5)):
        found = kernel(q, k, v, offsets, 0.0, 0.125, window)
        wanted = reference(q, k, v, offsets.offsets.tolist(), 0.125, window)
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("lengths", [[8, 3], [9, 3, 30], [1, 8, 40, 0, 41]])
def test_a_sliding_window_shorter_than_a_clip(lengths: list[int]) -> None:
    model = MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=8)).train()
    stock = MistralForCausalLM(copy.deepcopy(model.config)).train()
    stock.load_state_dict(model.state_dict())
    model.set_attn_implementation(NAME)
    block = padded(rows(lengths))
    torch.testing.assert_close(run_packed(model, [block])[-1], run_padded(stock, block)[-1], rtol=1e-4, atol=1e-5)
