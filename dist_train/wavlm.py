"""WavLM's self-attention with gated relative position bias (arXiv 2110.13900 §III-B), made for training.

transformers' WavLMAttention reads the weights of its projections without calling them (adapters on them then learn
nothing, quantised layers and the hooks of ZeRO-3 are passed by), and keeps several tensors of T x T per head, clip and
layer for the backward pass. Here the projections are called, and the backward pass computes the attention weights
again, a few queries at a time: no tensor of T x T outlives its chunk.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations import deepspeed as integration
from transformers.models.wavlm.modeling_wavlm import WavLMAttention


class ChunkSize(NamedTuple):
    """Most queries, and about how many attention weights, that are computed at once."""

    queries: int
    weights: int


ON_CPU = ChunkSize(128, 2**18)  # a few such tensors stay in a core's cache
ON_ACCELERATOR = ChunkSize(512, 2**26)  # few kernels, and 128 MiB per tensor in bf16


class Chunk(NamedTuple):
    """What is computed at once: rows (clip and head), queries, and the distances these queries have to the keys."""

    rows: slice
    queries: slice
    distances: slice


def chunks(query: Tensor) -> Iterator[Chunk]:
    """Divides the queries [R, T, d]."""
    size = ON_CPU if query.device.type == "cpu" else ON_ACCELERATOR
    rows, frames = query.shape[:2]
    queries = min(frames, size.queries)
    together = max(1, size.weights // (queries * frames))
    for row in range(0, rows, together):
        for start in range(0, frames, queries):
            stop = min(start + queries, frames)
            yield Chunk(slice(row, min(row + together, rows)), slice(start, stop), slice(start, stop + frames - 1))


class GatedBiasAttention(torch.autograd.Function):
    """Scaled dot-product attention whose additive mask is gate · bias + padding.

    The bias depends on the distance of key and query only. With queries in reversed order it is constant along
    anti-diagonals, so the bias of a run of queries is a view of the vector of distances and needs no memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gate: Tensor,
        bias: Tensor,
        padding: Tensor,
        dropout: float,
        seed: int,
    ) -> Tensor:
        """Attention of R rows (clips x heads) over T frames.

        Args:
            query: [R, T, d], scaled, last frame first.
            key: [R, T, d].
            value: [R, T, d].
            gate: [R, T, 1], last frame first.
            bias: [R, 2T - 1], entry n for a key n - T + 1 frames after the query.
            padding: [R, 1, T], added to the score of a key; no gradient.
            dropout: probability that a weight is dropped.
            seed: of the dropout.

        Returns:
            [R, T, d], last frame first.
        """
        kept = Dropout(dropout, seed, query.device)
        output = torch.empty_like(query)
        for rows, queries, distances in chunks(query):
            mask = gated_bias(gate[rows, queries], bias[rows, distances], padding[rows])
            if dropout:
                weights = attention_weights(query[rows, queries], key[rows], mask)
                output[rows, queries] = torch.bmm(weights.mul_(kept.draw(weights)), value[rows]).div_(1 - dropout)
            else:
                output[rows, queries] = F.scaled_dot_product_attention(
                    query[None, rows, queries], key[None, rows], value[None, rows], attn_mask=mask[None], scale=1.0
                )[0]
        ctx.save_for_backward(query, key, value, gate, bias, padding, output)
        ctx.dropout, ctx.seed = dropout, seed
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """The derivatives of FlashAttention's algorithm 4 (arXiv 2205.14135), and those of the gate and the bias."""
        query, key, value, gate, bias, padding, output = ctx.saved_tensors
        kept = Dropout(ctx.dropout, ctx.seed, query.device)
        frames = query.shape[1]
        # Summed over chunks, hence in full precision.
        exact = torch.promote_types(query.dtype, torch.float32)
        grad_key, grad_value, grad_bias = (torch.zeros_like(x, dtype=exact) for x in (key, value, bias))
        grad_query, grad_gate = torch.empty_like(query), torch.empty_like(gate)
        grad_output = grad_output.contiguous()
        kept_grad = grad_output / (1 - ctx.dropout)
        # What the derivative of softmax takes from every score of a query.
        shared = (grad_output * output).sum(-1, keepdim=True, dtype=exact)
        scores: Tensor | None = None

        for rows, queries, distances in chunks(query):
            grad = kept_grad[rows, queries]
            mask = gated_bias(gate[rows, queries], bias[rows, distances], padding[rows])
            weights = attention_weights(query[rows, queries], key[rows], mask)
            grad_weights = torch.bmm(grad, value[rows].transpose(1, 2))
            if ctx.dropout:
                mask = kept.draw(weights)
                grad_weights.mul_(mask)
                grad_value[rows] += torch.bmm((weights * mask).transpose(1, 2), grad)
            else:
                grad_value[rows] += torch.bmm(weights.transpose(1, 2), grad)
            if scores is None:  # the first chunk is the largest
                scores = weights.new_zeros(*weights.shape[:2], frames + weights.shape[1])
            count, length = weights.shape[:2]
            grad_scores = scores[:count, :length, :frames]
            torch.mul(grad_weights.sub_(shared[rows, queries]), weights, out=grad_scores)
            grad_query[rows, queries] = torch.bmm(grad_scores, key[rows])
            grad_key[rows] += torch.bmm(grad_scores.transpose(1, 2), query[rows, queries])
            # The same memory read with rows one shorter: a column is then a distance, thanks to the zeros between.
            width = scores.shape[2]
            by_distance = scores.as_strided(
                (count, length, frames + length - 1), (scores.shape[1] * width, width - 1, 1)
            )
            grad_gate[rows, queries] = torch.bmm(by_distance, bias[rows, distances, None])
            grad_bias[rows, distances] += torch.bmm(gate[rows, queries].transpose(1, 2), by_distance)[:, 0]

        return (
            grad_query,
            grad_key.to(key.dtype),
            grad_value.to(value.dtype),
            grad_gate,
            grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def gated_bias(gate: Tensor, bias: Tensor, padding: Tensor) -> Tensor:
    """gate [R, n, 1], bias [R, n + T - 1], padding [R, 1, T] → additive mask [R, n, T]."""
    mask = gate.new_empty(*gate.shape[:2], padding.shape[-1])  # left to itself, addcmul would transpose it
    return torch.addcmul(padding, gate, bias.unfold(-1, padding.shape[-1], 1), out=mask)


def attention_weights(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """query [R, n, d], key [R, T, d] → weights [R, n, T]; overwrites the mask."""
    return torch.softmax(mask.baddbmm_(query, key.transpose(1, 2)), -1)


class Dropout:
    """The same weights dropped, chunk by chunk, in the forward and the backward pass."""

    def __init__(self, probability: float, seed: int, device: torch.device) -> None:
        self.keep = 1 - probability
        self.generator = torch.Generator(device).manual_seed(seed) if probability else None

    def draw(self, weights: Tensor) -> Tensor:
        """1 for a weight that is kept, 0 for one that is dropped (what is kept is yet to be divided by 1 - p)."""
        drawn = torch.rand(weights.shape, device=weights.device, generator=self.generator)
        return drawn.lt_(self.keep).to(weights.dtype)


def first_weights(count: int, query: Tensor, key: Tensor, gate: Tensor, bias: Tensor, padding: Tensor) -> Tensor:
    """Attention weights [R, count, T] of the first frames, in full precision; arguments as of GatedBiasAttention."""
    start = query.shape[1] - count  # the last frame comes first
    exact = torch.promote_types(query.dtype, torch.float32)
    query, key, gate, bias, padding = (x.to(exact) for x in (query[:, start:], key, gate[:, start:], bias, padding))
    return attention_weights(query, key, gated_bias(gate, bias[:, start:], padding)).flip(1)


class Attention(WavLMAttention):
    """WavLMAttention's parameters and results, computed by GatedBiasAttention."""

    watched = 0
    """First frames whose weights are told to `watch` (the report shows those of CMPT's tokens)."""
    watch: Callable[[Tensor], None] | None = None
    """Gets [B, heads, watched, T]."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None, Tensor]:
        """hidden_states [B, T, D] → the same shape, no weights, and the position bias for the next layers.

        Args:
            hidden_states: input.
            attention_mask: [B, T], true where there is sound; a clip without any gets finite states.
            position_bias: [heads, 2T - 1] from the layer below; the first layer computes it from its buckets.
        """
        clips, frames = hidden_states.shape[:2]
        if position_bias is None:
            distance = torch.arange(1 - frames, frames, device=hidden_states.device)
            position_bias = self.rel_attn_embed(self._relative_positions_bucket(distance)).T
        padding = hidden_states.new_zeros(clips, 1, frames)
        if attention_mask is not None:
            # Finite, and so is its multiple by log2(e) inside of kernels.
            padding.masked_fill_(attention_mask.ne(1)[:, None], torch.finfo(padding.dtype).min / 2)
        reversed_states = hidden_states.flip(1)
        dropout = self.dropout if self.training else 0.0
        query = self.by_head(self.q_proj(reversed_states)) * self.scaling
        key = self.by_head(self.k_proj(hidden_states))
        value = self.by_head(self.v_proj(hidden_states))
        gate = self.by_head(self.gate(reversed_states))
        bias = position_bias.repeat(clips, 1)
        padding = padding.repeat_interleave(self.num_heads, 0)
        if self.watch is not None:
            with torch.no_grad():
                weights = first_weights(self.watched, query, key, gate, bias, padding)
            self.watch(weights.unflatten(0, (clips, self.num_heads)))
        context = GatedBiasAttention.apply(
            query,
            key,
            value,
            gate,
            bias,
            padding,
            dropout,
            int(torch.randint(2**62, ())) if dropout else 0,
        )
        context = context.unflatten(0, (clips, self.num_heads)).transpose(1, 2).flatten(2)
        return self.out_proj(context.flip(1)), None, position_bias

    def by_head(self, states: Tensor) -> Tensor:
        """[B, T, heads · n] → [B · heads, T, n]."""
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).flatten(0, 1).contiguous()

    def gate(self, hidden_states: Tensor) -> Tensor:
        """[B, T, D] → gate of the position bias [B, T, heads] (arXiv 2110.13900 eq. 3-5)."""
        by_head = hidden_states.unflatten(-1, (self.num_heads, -1))
        update, reset = self.gru_rel_pos_linear(by_head).unflatten(-1, (2, 4)).sum(-1).sigmoid().unbind(-1)
        return update * (reset * self.gru_rel_pos_const.flatten() - 1) + 2


def use_own_attention(model: nn.Module) -> None:
    """Replaces transformers' attention in a WavLM, in place; parameters keep their names, order and values."""
    for module in model.modules():
        if type(module) is WavLMAttention:
            module.__class__ = Attention


@contextmanager
def outside_zero_init() -> Iterator[None]:
    """What is built in here is whole: neither deepspeed.zero.Init nor a live HfDeepSpeedConfig shards it at once.

    WavLM's convolutional position embedding has a weight norm over a dimension that a shard does not have, and PEFT
    cannot initialise adapters that are shards. The engine shards them later.
    """
    config = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    partition: Any = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if partition is not None:
        partition.shutdown_init_context()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = config
        if partition is not None:
            partition.restore_init_context()
