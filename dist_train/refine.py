"""Value-guided modality refinement (VGMR): every modality is weighed before it is fused, step by step and channel by
channel (arXiv 2606.02679).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_train.kinds import OfKind
from dist_train.missing import Streams
from dist_train.packed import TextStates


class RefineSettings(OfKind):
    """What stands in front of the fusion network."""

    kind: Literal["none", "vgmr"] = Field(
        "none", description="`none`, or `vgmr`. `refine: vgmr` is short for refine.kind. Default: none."
    )
    width: int = Field(128, ge=1, description="Width of the projected steps and of all vectors in VGMR (d_p).")
    alpha: float = Field(0.5, ge=0, le=1, description="How far the gate may go from 1 (paper: 0.5).")
    beta: float = Field(0.2, ge=0, le=1, description="Share of the input that passes ungated (paper: 0.2).")
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout probability of the refined features.")
    global_value: bool = Field(True, description="One value g per modality and clip (ablation: false).")
    channel_values: bool = Field(True, description="A value p per channel (ablation: false).")
    agreement: bool = Field(True, description="Modalities compare by products (ablation: false).")
    discrepancy: bool = Field(True, description="Modalities compare by differences (ablation: false).")


class Values(NamedTuple):
    """What VGMR thinks of each modality of n clips.

    estimates [n, 3, k]: g and the mean of p, each in (0, 1), as far as the recipe has them; spread [n, 3, 1]: standard
    deviation of p over its channels ([n, 3, 0] without p); gate [n, 3]: mean of the gate over real steps and channels.
    """

    estimates: Tensor
    spread: Tensor
    gate: Tensor


class Look(NamedTuple):
    """What a modality [n, T, D] says by itself, whatever the others are: its evidence s [n, d], and the part of its
    gate's logits [n, T, D] that no value enters.
    """

    evidence: Tensor
    logits: Tensor


def two_layers(inputs: int, width: int, outputs: int | None = None) -> nn.Sequential:
    """Linear, GELU, Linear. With a ReLU all units of the evidence died in a training of ten epochs."""
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, outputs or width))


class Refiner(nn.Module):
    """VGMR of one modality: evidence, relation to the other modalities, values, gate.

    ``H = P(X)``; ``s = MLP([mean(H); max(H)])``; ``r = MLP([s; others; products; differences; mean of others])``;
    ``z = MLP([s; r])``; ``g = sigmoid(w z + b)``, ``p = sigmoid(W z + b)``; gate
    ``G = sigmoid(rho_x(X) + rho_h(H) + rho_g(2g - 1) + rho_p(2p - 1))``, ``1 + alpha (2G - 1)`` of which a share of
    ``1 - beta`` acts; output ``Dropout(LayerNorm(X * G))``. The paper leaves rho_x open: here it goes through d_p
    features, so that its size grows with the input's width and not with the square.

    Args:
        inputs: width of X.
        others: how many other modalities there are.
    """

    def __init__(self, inputs: int, others: int, settings: RefineSettings) -> None:
        super().__init__()
        self.settings, d = settings, settings.width
        self.project = nn.Linear(inputs, d)
        self.evidence = two_layers(2 * d, d)
        self.relation = two_layers(d * (2 + others * (1 + settings.agreement + settings.discrepancy)), d)
        self.join = two_layers(2 * d, d)
        self.gate_input = two_layers(inputs, d, inputs)
        self.gate_projected = nn.Linear(d, inputs)
        self.value = nn.Linear(d, 1) if settings.global_value else None
        self.gate_value = nn.Linear(1, inputs) if settings.global_value else None
        self.channels = nn.Linear(d, d) if settings.channel_values else None
        self.gate_channels = nn.Linear(d, inputs) if settings.channel_values else None
        self.norm = nn.LayerNorm(inputs)
        self.dropout = nn.Dropout(settings.dropout)

    def look(self, x: Tensor, mask: Tensor) -> Look:
        """Of X [B, T, D], mask [B, T]."""
        projected = self.project(x)
        real = mask[..., None]
        mean = (projected * real).sum(1) / real.sum(1)
        most = projected.masked_fill(~real, -torch.inf).amax(1)
        return Look(self.evidence(torch.cat([mean, most], -1)), self.gate_input(x) + self.gate_projected(projected))

    def judge(self, own: Tensor, others: Sequence[Tensor]) -> Tensor:
        """s of this and of the other modalities → z [B, d]."""
        parts = [own, *others]
        if self.settings.agreement:
            parts += [own * other for other in others]
        if self.settings.discrepancy:
            parts += [(own - other).abs() for other in others]
        parts.append(torch.stack(list(others)).mean(0))
        return self.join(torch.cat([own, self.relation(torch.cat(parts, -1))], -1))

    def forward(
        self, x: Tensor, mask: Tensor, own: Look, others: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Refined X [B, T, D], and of each clip: estimates [B, k], spread [B, 0 or 1], mean gate [B]."""
        z, logits = self.judge(own.evidence, others), own.logits
        estimates, spread = [], z[:, :0]
        if self.value is not None and self.gate_value is not None:
            g = torch.sigmoid(self.value(z))
            logits = logits + self.gate_value(2 * g - 1)[:, None]
            estimates.append(g[:, 0])
        if self.channels is not None and self.gate_channels is not None:
            p = torch.sigmoid(self.channels(z))
            logits = logits + self.gate_channels(2 * p - 1)[:, None]
            estimates.append(p.mean(1))
            spread = (p.float().var(1, correction=0, keepdim=True) + 1e-8).sqrt()
        gate = 1 + self.settings.alpha * (2 * torch.sigmoid(logits) - 1)
        gate = self.settings.beta + (1 - self.settings.beta) * gate
        refined = self.dropout(self.norm(x * gate))
        real = mask[..., None]
        shown = (gate.detach() * real).sum((1, 2)) / (real.sum((1, 2)) * gate.shape[2])
        return refined, torch.stack(estimates, 1) if estimates else z[:, :0], spread, shown


class VGMR(nn.Module):
    """Refines the streams of one flow.

    Args:
        widths: features per step of audio, text and vision.
    """

    def __init__(self, widths: Sequence[int], settings: RefineSettings) -> None:
        super().__init__()
        self.refiners = nn.ModuleList(Refiner(width, len(widths) - 1, settings) for width in widths)

    def looks(self, streams: Streams, before: Streams | None = None, known: Sequence[Look] = ()) -> list[Look]:
        """Of each stream. What is `known` of the streams `before` holds for those that are the same now: looking is
        most of the work.
        """
        return [
            known[number] if before is not None and stream is before[number] else refiner.look(*stream)  # type: ignore[operator]
            for number, (refiner, stream) in enumerate(zip(self.refiners, streams, strict=True))
        ]

    def forward(self, streams: Streams, looks: Sequence[Look] | None = None) -> tuple[Streams, Values]:
        """Streams → refined streams of the same shapes, and what VGMR thinks of them.

        Args:
            looks: at these streams, if they are known.
        """
        looks = self.looks(streams) if looks is None else looks
        found = []
        for number, (refiner, stream) in enumerate(zip(self.refiners, streams, strict=True)):
            others = [look.evidence for other, look in enumerate(looks) if other != number]
            found.append(refiner(*stream, looks[number], others))
        refined = Streams(*(TextStates(x, stream.mask) for (x, *_), stream in zip(found, streams, strict=True)))
        return refined, Values(*(torch.stack(column, 1) for column in list(zip(*found, strict=True))[1:]))
