"""SDUMC's fusion network under the official module names, one clip at a time, written from METHOD's description."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from dist_train.imagination import Skip

MODALITIES = ("audio", "text", "video")


def mlp(*widths: int) -> nn.Sequential:
    """Linear, ReLU, dropout: the parameters have the numbers 0, 3, …"""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(0.3)]
    return nn.Sequential(*layers)


class Pool(nn.Module):
    """Attention over time; the query is a parameter, or asked for."""

    def __init__(self, width: int, *, asked: bool) -> None:
        super().__init__()
        self.input_proj = nn.Linear(width, width)
        if asked:
            self.query_proj = nn.Linear(width, width)
        else:
            self.attention_context_vector = nn.Parameter(torch.randn(1, width))

    def forward(self, steps: Tensor, query: Tensor | None = None) -> Tensor:
        """steps [T, d], query [d] → [d]."""
        asked = self.attention_context_vector[0] if query is None else self.query_proj(query)
        shares = torch.softmax(0.3 * torch.tanh(self.input_proj(steps)) @ asked, 0)
        return shares @ steps


class Imagination(nn.Module):
    def __init__(self, width: int, bottleneck: int, skip: Skip) -> None:
        super().__init__()
        self.skip = skip
        self.transition = nn.Sequential(nn.Linear(3 * width, width), nn.ReLU(), nn.Linear(width, width))
        self.encoder_0 = nn.Sequential(nn.Linear(width, bottleneck))
        self.decoder_0 = nn.Sequential(nn.Linear(bottleneck, width))

    def forward(self, audio: Tensor, text: Tensor, video: Tensor) -> Tensor:
        start = self.transition(torch.cat([audio, text, video], -1))
        return self.decoder_0(self.encoder_0(start)) + (text if self.skip == "text" else start)


class Official(nn.Module):
    """Both official classes: `normali` has parameters in that of the transition skip only."""

    def __init__(
        self, audio: int, text: int, video: int, skip: Skip, width: int = 256, bottlenecks: tuple[int, int] = (128, 64)
    ) -> None:
        super().__init__()
        for number, (name, inputs) in enumerate(zip(MODALITIES, (audio, text, video), strict=True)):
            setattr(self, f"frame_dim_reshape_{number}", nn.Linear(inputs, width))
            setattr(self, f"fra2utt_{number}", Pool(width, asked=False))
            setattr(self, f"{name}_mlp", mlp(width, width, width))
            setattr(self, f"cross_att_fra2utt_{number}", Pool(width, asked=True))
            setattr(self, f"cross_{name}_mlp", mlp(width, width, 128))
        for name in ("fused", "at", "tv", "av", *MODALITIES):
            setattr(self, f"cross_{name}_query_mlp", mlp(width, width))
        self.attention_mlp, self.fc_att = mlp(3 * width, width, width), nn.Linear(width, 3)
        self.cross_attention_mlp, self.cross_fc_att = mlp(7 * 128, width, 128), nn.Linear(128, 7)
        self.missing_text_imagination_mlp = Imagination(width, bottlenecks[0], skip)
        self.missing_cross_text_query_imagination_mlp = Imagination(128, bottlenecks[1], skip)
        self.fc_out_e, self.fc_out_v, self.fc_out_ev = nn.Linear(128, 1), nn.Linear(128, 1), nn.Linear(1, 1)
        self.orgin_linear_change = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64))
        self.prelu, self.layer_normali = nn.PReLU(6), nn.LayerNorm(width)
        self.normali = nn.BatchNorm1d(7) if skip == "transition" else nn.Identity()

    @torch.no_grad()
    def forward(self, clip: list[Tensor], *, missing: bool) -> Tensor:
        """clip: audio, text, video [T, width] → valence []."""
        steps = [getattr(self, f"frame_dim_reshape_{n}")(x) for n, x in enumerate(clip)]
        pooled = [
            getattr(self, f"{name}_mlp")(getattr(self, f"fra2utt_{n}")(steps[n])) for n, name in enumerate(MODALITIES)
        ]
        if missing:
            pooled[1] = self.missing_text_imagination_mlp(*pooled)
        gate = self.fc_att(self.attention_mlp(torch.cat(pooled)))
        a, t, v = (share * vector for share, vector in zip(gate, pooled, strict=True))
        mixed = {
            "fused": a + t + v,
            "at": a + t,
            "tv": t + v,
            "av": a + v,
            **dict(zip(MODALITIES, pooled, strict=True)),
        }
        views = []
        for name, vector in mixed.items():
            query = getattr(self, f"cross_{name}_query_mlp")(vector)
            seen = [
                getattr(self, f"cross_{other}_mlp")(getattr(self, f"cross_att_fra2utt_{n}")(steps[n], query))
                for n, other in enumerate(MODALITIES)
            ]
            if missing:
                seen[1] = self.missing_cross_text_query_imagination_mlp(*seen)
            views.append(sum(share * vector for share, vector in zip(gate, seen, strict=True)))
        weights = self.cross_fc_att(self.cross_attention_mlp(torch.cat(views)))
        return self.fc_out_v(weights @ torch.stack(views))[0]


class Holder(nn.Module):
    """The official `get_models`: the network is its `model`."""

    def __init__(self, model: Official) -> None:
        super().__init__()
        self.model = model
