"""WavLM's forward under its authors' module names, written out from arXiv 2110.13900 and checked shapes: a reference
for converted weights. One clip at a time, no dropout, no masking.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import weight_norm

CONVOLUTIONS = [(8, 10, 5), (8, 3, 2), (8, 3, 2), (8, 2, 2)]
CONVOLUTIONS_TEXT = "[(8,10,5)] + [(8,3,2)] * 2 + [(8,2,2)]"
WIDTH, HEADS, INNER, BUCKETS, DISTANCE = 16, 2, 28, 12, 20


def configuration(*, large: bool) -> dict[str, Any]:
    """`cfg` of a published file: of WavLM-Large's kind (norms first) or WavLM-Base's."""
    return {
        "extractor_mode": "layer_norm" if large else "default", "layer_norm_first": large, "normalize": large,
        "encoder_layers": 3, "encoder_embed_dim": WIDTH, "encoder_ffn_embed_dim": INNER,
        "encoder_attention_heads": HEADS, "activation_fn": "gelu", "conv_feature_layers": CONVOLUTIONS_TEXT,
        "conv_bias": False, "dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.0,
        "encoder_layerdrop": 0.05, "dropout_input": 0.1, "mask_prob": 0.65, "mask_length": 10, "conv_pos": 6,
        "conv_pos_groups": 4, "relative_position_embedding": True, "num_buckets": BUCKETS, "max_distance": DISTANCE,
        "gru_rel_pos": True, "feature_grad_mult": 1.0,
    }  # fmt: skip


class Slot(nn.Module):
    """Holds modules under numbers, as the original's nested Sequentials name their parameters."""

    def __init__(self, **inner: nn.Module) -> None:
        super().__init__()
        for name, module in inner.items():
            self.add_module(name.removeprefix("_"), module)


class Attention(nn.Module):
    def __init__(self, *, first: bool) -> None:
        super().__init__()
        size = WIDTH // HEADS
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH))
        self.grep_linear = nn.Linear(size, 8)
        self.grep_a = nn.Parameter(torch.ones(1, HEADS, 1, 1))
        if first:
            self.relative_attention_bias = nn.Embedding(BUCKETS, HEADS)


class Layer(nn.Module):
    def __init__(self, *, first: bool) -> None:
        super().__init__()
        self.self_attn = Attention(first=first)
        self.self_attn_layer_norm = nn.LayerNorm(WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.final_layer_norm = nn.LayerNorm(WIDTH)


class OriginalWavLM(nn.Module):
    """Random weights; `state_dict` has the published names."""

    def __init__(self, *, large: bool) -> None:
        super().__init__()
        self.large = large
        stack = nn.ModuleList()
        wide = 1
        for number, (out, kernel, stride) in enumerate(CONVOLUTIONS):
            inner: dict[str, nn.Module] = {"_0": nn.Conv1d(wide, out, kernel, stride, bias=False)}
            if large:
                inner["_2"] = Slot(_1=nn.LayerNorm(out))
            elif number == 0:
                inner["_2"] = nn.GroupNorm(out, out)
            stack.append(Slot(**inner))
            wide = out
        self.feature_extractor = Slot(conv_layers=stack)
        self.layer_norm = nn.LayerNorm(wide)
        self.post_extract_proj = nn.Linear(wide, WIDTH)
        self.mask_emb = nn.Parameter(torch.rand(WIDTH))
        self.encoder = nn.Module()
        positions = weight_norm(nn.Conv1d(WIDTH, WIDTH, 6, padding=3, groups=4), name="weight", dim=2)
        self.encoder.pos_conv = Slot(_0=positions)
        self.encoder.layers = nn.ModuleList(Layer(first=number == 0) for number in range(3))
        self.encoder.layer_norm = nn.LayerNorm(WIDTH)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() > 1 or "bias" in name or "grep_a" in name:
                    parameter.add_(0.2 * torch.randn_like(parameter))

    @torch.no_grad()
    def forward(self, waveform: Tensor) -> Tensor:
        """waveform [S] → states after embedding and after each layer [4, T, D]; the last after the final norm."""
        x = waveform[None]
        for slot in self.feature_extractor.conv_layers:  # type: ignore[union-attr]
            parts = dict(slot.named_children())
            x = parts["0"](x[None])[0]
            if self.large:
                x = getattr(parts["2"], "1")(x.T).T
            elif "2" in parts:
                x = parts["2"](x[None])[0]
            x = F.gelu(x)
        x = self.post_extract_proj(self.layer_norm(x.T))
        positions = getattr(self.encoder.pos_conv, "0")(x.T[None])[0, :, :-1]  # an even kernel gives one too many
        x = x + F.gelu(positions).T
        if not self.large:
            x = self.encoder.layer_norm(x)  # type: ignore[operator]
        states = [x]
        bias = self.position_bias(len(x))
        for layer in self.encoder.layers:  # type: ignore[union-attr]
            x = self.layer(layer, x, bias)
            states.append(x)
        if self.large:
            states[-1] = self.encoder.layer_norm(x)  # type: ignore[operator]
        return torch.stack(states)

    def layer(self, layer: Any, x: Tensor, bias: Tensor) -> Tensor:
        """Norms before (large) or after."""

        def feed(y: Tensor) -> Tensor:
            return layer.fc2(F.gelu(layer.fc1(y)))

        if self.large:
            x = x + attend(layer.self_attn, layer.self_attn_layer_norm(x), bias)
            return x + feed(layer.final_layer_norm(x))
        x = layer.self_attn_layer_norm(x + attend(layer.self_attn, x, bias))
        return layer.final_layer_norm(x + feed(x))

    def position_bias(self, frames: int) -> Tensor:
        """[heads, T, T] by the bucket of key minus query."""
        table = self.encoder.layers[0].self_attn.relative_attention_bias.weight  # type: ignore[union-attr,index]
        half = BUCKETS // 2
        exact = half // 2
        found = torch.empty(HEADS, frames, frames)
        for query in range(frames):
            for key in range(frames):
                away = abs(key - query)
                if away < exact:
                    bucket = away
                else:
                    share = math.log(away / exact) / math.log(DISTANCE / exact)
                    bucket = min(exact + int(share * (half - exact)), half - 1)
                found[:, query, key] = table[bucket + (half if key > query else 0)]
        return found


def attend(own: Any, x: Tensor, bias: Tensor) -> Tensor:
    """Self-attention with the gated position bias (eq. 3-5)."""
    size = WIDTH // HEADS
    outs = []
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        q, k, v = (getattr(own, f"{name}_proj")(x)[:, part] for name in "qkv")
        sums = own.grep_linear(x[:, part]).view(-1, 2, 4).sum(-1)
        update, reset = torch.sigmoid(sums).unbind(-1)
        gate = update * (reset * own.grep_a[0, head, 0, 0] - 1) + 2
        outs.append(torch.softmax(q @ k.T / size**0.5 + gate[:, None] * bias[head], -1) @ v)
    return own.out_proj(torch.cat(outs, -1))
