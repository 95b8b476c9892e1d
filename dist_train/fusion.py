"""The fusion network: three feature sequences of one flow to a prediction (SDUMC, arXiv 2410.15029).

Shapes: B clips, T steps (each modality has its own T), d = ``FusionSettings.width``. Modalities in the order audio,
text, vision.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dist_train.cmpt import CMPT, Available, Pooled
from dist_train.imagination import MIA, ImaginationSettings
from dist_train.missing import TEXT, Streams, absent, lacked
from dist_train.names import MODALITIES
from dist_train.promma import ProMMA
from dist_train.refine import VGMR, Look, RefineSettings
from dist_train.rollout import evaluating

REPRESENTATION_WIDTH = 128
RNC_WIDTH = 64
# The seven views in the order of the official code, each by the modalities it is made of (0 audio, 1 text, 2 vision).
VIEWS = {"avt": (0, 1, 2), "at": (0, 1), "tv": (1, 2), "av": (0, 2), "a": (0,), "t": (1,), "v": (2,)}
FIRST_SINGLE = list(VIEWS).index("a")  # the views of one modality come last, in the modalities' order


class FusionSettings(BaseModel):
    """The fusion network."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    width: int = Field(default=256, ge=1, description="Features per step and per pooled vector (d). Default: 256.")
    dropout: float = Field(
        default=0.3, ge=0, lt=1, description="Dropout probability after each MLP layer. Default: 0.3."
    )
    attention_dropout: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="Dropout probability before and after each attention pooling. Default: 0.5.",
    )
    attention_scale: float = Field(
        default=0.3, gt=0, description="Factor on the attention scores before the softmax over time. Default: 0.3."
    )


class FusionWidths(NamedTuple):
    """Features per step of the three inputs; real and simulated text have the same width."""

    audio: int
    text: int
    vision: int


class FlowOutput(NamedTuple):
    """What one flow yields, per clip."""

    prediction: Tensor
    """[B] valence, or logits [B, C] of classes."""
    representation: Tensor
    """[B, 128] final representation (L_RS)."""
    rnc: Tensor
    """[B, 64] side head (RNC)."""
    query: Tensor
    """[B, d] vector of the modality that the missing flow lacks, after its view MLP (MKD-1)."""
    views: Tensor
    """[B, 7, 128] the same modality seen by the seven views (MKD-2)."""


class Fused(NamedTuple):
    """Both flows of B clips, and what else the losses need of each clip: named tensors [B, …].

    Outside of training also `stand_in` [B, 3, d]: pooled vectors of the modality that the missing flow lacks, as the
    complete flow has it, as it comes into the missing flow, and as it is imagined there.
    """

    complete: FlowOutput
    missing: FlowOutput
    notes: dict[str, Tensor]


def prediction_errors(prediction: Tensor, labels: Tensor) -> Tensor:
    """Of each clip, in fp32 or better: squared error of a number, or cross-entropy of a class in nats.

    Args:
        prediction: [n] valence, or logits [n, C].
        labels: [n]; of a class its place, from 0.
    """
    prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
    if prediction.dim() == 2:
        return cross_entropy(prediction, labels.long(), reduction="none")
    return (prediction - labels.to(prediction.dtype)).square()


def _mlp(dropout: float, *widths: int) -> nn.Sequential:
    """Linear, ReLU and dropout for each consecutive pair of widths."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers)


class UMCA(nn.Module):
    """Uni-modal cross attention, single head: key = tanh(Linear(X)), value = X, softmax over the real steps.

    X passes a dropout first, so does the result. Scores, softmax and sum are taken in fp32 whatever the input type is.
    """

    def __init__(self, settings: FusionSettings) -> None:
        super().__init__()
        self.scale = settings.attention_scale
        self.key = nn.Linear(settings.width, settings.width)
        self.dropout = nn.Dropout(settings.attention_dropout)

    def attend(self, sequence: Tensor, mask: Tensor, queries: Tensor) -> Tensor:
        """[B, T, d], [B, T] (True = real step; at least one per clip) and queries [B, Q, d] to [B, Q, d]."""
        sequence = self.dropout(sequence)
        key = torch.tanh(self.key(sequence))
        exact = torch.promote_types(sequence.dtype, torch.float32)
        scores = self.scale * queries.to(exact) @ key.to(exact).transpose(1, 2)
        weights = scores.masked_fill(~mask.unsqueeze(1), -torch.inf).softmax(dim=-1)
        pooled = weights @ sequence.to(exact)
        return self.dropout(pooled.to(sequence.dtype))


class PooledUMCA(UMCA):
    """UMCA stage 1: one learnable query pools a sequence into one vector."""

    def __init__(self, settings: FusionSettings) -> None:
        super().__init__(settings)
        self.query = nn.Parameter(nn.init.xavier_normal_(torch.empty(1, settings.width)))
        self.mlp = _mlp(settings.dropout, settings.width, settings.width, settings.width)

    def forward(self, sequence: Tensor, mask: Tensor) -> Tensor:
        """[B, T, d] and mask [B, T] to [B, d]."""
        queries = self.query.expand(len(sequence), 1, -1)
        return self.mlp(self.attend(sequence, mask, queries).squeeze(1))


class ViewUMCA(UMCA):
    """UMCA stage 2: every view asks the sequence its own question."""

    def __init__(self, settings: FusionSettings) -> None:
        super().__init__(settings)
        self.query = nn.Linear(settings.width, settings.width)
        self.mlp = _mlp(settings.dropout, settings.width, settings.width, REPRESENTATION_WIDTH)

    def forward(self, sequence: Tensor, mask: Tensor, views: Tensor) -> Tensor:
        """[B, T, d], mask [B, T] and views [B, 7, d] to [B, 7, 128]."""
        return self.mlp(self.attend(sequence, mask, self.query(views)))


class AFG(nn.Module):
    """Adaptive fusion gate: raw weights (no softmax) for the parts of a concatenation."""

    def __init__(self, dropout: float, *widths: int) -> None:
        super().__init__()
        *hidden, parts = widths
        self.mlp = _mlp(dropout, *hidden)
        self.weights = nn.Linear(hidden[-1], parts)

    def forward(self, parts: Tensor) -> Tensor:
        """Stacked vectors [B, parts, width] to their weights [B, parts]."""
        return self.weights(self.mlp(parts.flatten(1)))


class FusionNetwork(nn.Module):
    """Both flows' fusion network; real and simulated text go through the same weights.

    A prediction does not depend on the other clips of the batch: every softmax over time leaves the padding out (the
    official code has no masks; without padding the two agree).

    Args:
        widths: features per step of audio, text and vision.
        settings: see :class:`FusionSettings`.
        imagination: see :class:`~dist_train.imagination.ImaginationSettings`; disabled, no MIA parameters exist.
        lacks: the modalities that the missing flow may lack in training; each has its own MIA.
        refine: see :class:`~dist_train.refine.RefineSettings`. Default: nothing in front.
        heard_width: of the states of CMPT's tokens in the speech encoder, if it holds them.
        classes: how many are told apart; 0: the head predicts a number.
    """

    def __init__(
        self,
        widths: FusionWidths,
        settings: FusionSettings,
        imagination: ImaginationSettings,
        lacks: Sequence[str] = ("text",),
        refine: RefineSettings | None = None,
        heard_width: int | None = None,
        classes: int = 0,
    ) -> None:
        super().__init__()
        d, dropout = settings.width, settings.dropout
        self.refine = VGMR(widths, refine) if refine is not None and refine.kind == "vgmr" else None
        self.projections = nn.ModuleList(nn.Linear(width, d) for width in widths)
        self.pooled_attention = nn.ModuleList(PooledUMCA(settings) for _ in widths)
        self.modality_gate = AFG(dropout, 3 * d, d, d, 3)
        self.views = nn.ModuleDict({name: _mlp(dropout, d, d) for name in VIEWS})
        self.view_attention = nn.ModuleList(ViewUMCA(settings) for _ in widths)
        self.view_gate = AFG(dropout, len(VIEWS) * REPRESENTATION_WIDTH, d, REPRESENTATION_WIDTH, len(VIEWS))
        self.head = nn.Linear(REPRESENTATION_WIDTH, classes or 1)
        self.classifies = classes > 0
        self.rnc_head = nn.Sequential(
            nn.Linear(REPRESENTATION_WIDTH, RNC_WIDTH), nn.ReLU(), nn.Linear(RNC_WIDTH, RNC_WIDTH)
        )
        self.pooled_imagination, self.views_imagination = (
            nn.ModuleDict(
                {
                    name: MIA(width, bottleneck, imagination.skip, MODALITIES.index(name))
                    for name in (lacks if imagination.mia else ())
                }
            )
            for width, bottleneck in (
                (d, imagination.pooled_bottleneck),
                (REPRESENTATION_WIDTH, imagination.views_bottleneck),
            )
        )
        self.promma = (
            ProMMA(
                d,
                modalities=len(widths),
                prompts=imagination.prompts,
                levels=imagination.levels,
                heads=imagination.heads,
                dropout=dropout,
            )
            if imagination.promma
            else None
        )
        self.cmpt = CMPT(lacks, heard_width, d, heads=imagination.heads, dropout=dropout) if imagination.cmpt else None

    def encode_views(self, vectors: Tensor, weights: Tensor) -> Tensor:
        """Pooled modality vectors [B, 3, d] and their weights [B, 3] to the seven views [B, 7, d].

        A view of several modalities is their weighted sum, a view of one modality the plain vector.
        """
        weighted = weights.unsqueeze(-1) * vectors
        views = []
        for members, mlp in zip(VIEWS.values(), self.views.values(), strict=True):
            mixed = weighted[:, list(members)].sum(1) if len(members) > 1 else vectors[:, members[0]]
            views.append(mlp(mixed))
        return torch.stack(views, dim=1)

    def forward(
        self,
        complete: Streams,
        missing: Streams,
        dropped: Tensor,
        labels: Tensor | None = None,
        available: Available | None = None,
    ) -> Fused:
        """The complete flow and the missing flow over the same clips.

        Args:
            complete, missing: features [B, T, width] of audio, text and vision with their masks, True at real steps, at
                least one per clip; padding must be finite. An absent modality is one real step of zeros.
            dropped: bool [B, 3], the modalities that the missing flow does without; they are imagined.
            labels: [B], wanted in training by VGMR, whose values learn what a modality is worth, and by ProMMA, which
                learns what imagined text is worth.
            available: wanted by CMPT.
        """
        notes: dict[str, Tensor] = {}
        looks: tuple[Sequence[Look], Sequence[Look]] = ((), ())
        if self.refine is not None:
            whole_looks = self.refine.looks(complete)
            looks = whole_looks, self.refine.looks(missing, complete, whole_looks)
        if labels is not None and self.training:
            if self.refine is not None:
                notes["worth/complete"] = self.worth(complete, dropped, labels, looks[0], missing=False)
                notes["worth/missing"] = self.worth(missing, dropped, labels, looks[1], missing=True)
            if self.promma is not None:
                gain = self.worth(missing, dropped, labels, looks[1], missing=True, removed=[TEXT])
                notes["gain"] = gain[:, 0]
        if self.refine is not None:
            complete, values = self.refine(complete, looks[0])
            missing, left = self.refine(missing, looks[1])
            for field in values._fields:
                notes |= {f"{field}/complete": getattr(values, field), f"{field}/missing": getattr(left, field)}
        projected = self.project(complete)
        kept = [again is once for once, again in zip(complete, missing, strict=True)]  # both flows read it
        parts = zip(kept, projected, self.projections, missing, strict=True)
        left_over = [once if same else projection(stream.states) for same, once, projection, stream in parts]
        whole = self.look(projected, [stream.mask for stream in complete], torch.zeros_like(dropped))
        rest = self.look(left_over, [stream.mask for stream in missing], dropped)
        incoming = rest.vectors
        if self.cmpt is not None and available is not None:
            proxies = self.cmpt(projected, [stream.mask for stream in complete], available.heard)
            notes["alignment"] = self.cmpt.distances(whole.vectors, proxies, available.present)
            rest = self.cmpt.fill(rest, proxies, available.present, dropped)
        if not self.training:  # to be shown; in training all notes travel to all ranks
            imagined = imagine(self.pooled_imagination, rest.vectors, dropped)
            rows, which = torch.arange(len(dropped), device=dropped.device), lacked(dropped)
            of = [torch.stack(list(vectors), 1)[rows, which] for vectors in (whole.vectors, incoming, imagined)]
            notes["stand_in"] = torch.stack(of, 1)
        return Fused(self.flow(whole, dropped, missing=False), self.flow(rest, dropped, missing=True), notes)

    @torch.no_grad()
    def worth(
        self,
        streams: Streams,
        dropped: Tensor,
        labels: Tensor,
        looks: Sequence[Look],
        *,
        missing: bool,
        removed: Sequence[int] = range(len(MODALITIES)),
    ) -> Tensor:
        """[B, len(removed)]: by how much the `prediction_errors` of this flow grow without each modality (VGMR).

        A fusion pass for each, and one over everything: all without dropout, whose noise would drown the difference.
        The language model does not run again.

        Args:
            looks: of `refine` at the streams.
        """
        errors = []
        with evaluating(self):
            for gone in (None, *removed):
                refined = Streams(*(absent(x) if number == gone else x for number, x in enumerate(streams)))
                if self.refine is not None:
                    refined, _ = self.refine(refined, self.refine.looks(refined, streams, looks))
                imagined = dropped if missing else torch.zeros_like(dropped)
                seen = self.look(self.project(refined), [stream.mask for stream in refined], imagined)
                output = self.flow(seen, dropped, missing=missing)
                errors.append(prediction_errors(output.prediction.float(), labels))
        return torch.stack([error - errors[0] for error in errors[1:]], 1)

    def project(self, streams: Streams) -> list[Tensor]:
        """Each stream [B, T, width] → [B, T, d]."""
        return [projection(stream.states) for projection, stream in zip(self.projections, streams, strict=True)]

    def look(self, sequences: Sequence[Tensor], masks: Sequence[Tensor], imagined: Tensor) -> Pooled:
        """Projected audio, text and vision [B, T, d] → each with its pooled vector.

        Args:
            imagined: bool [B, 3], what is not real.
        """
        if self.promma is not None:
            sequences, masks, _ = self.promma(sequences, masks, imagined)
        vectors = [umca(x, m) for umca, x, m in zip(self.pooled_attention, sequences, masks, strict=True)]
        return Pooled(list(sequences), list(masks), vectors)

    def flow(self, seen: Pooled, dropped: Tensor, *, missing: bool) -> FlowOutput:
        """One flow; MIA imagines nothing in the complete flow."""
        sequences, masks, pooled = seen
        if missing:
            pooled = imagine(self.pooled_imagination, pooled, dropped)
        vectors = torch.stack(pooled, dim=1)
        weights = self.modality_gate(vectors)

        views = self.encode_views(vectors, weights)
        viewed = [umca(x, m, views) for umca, x, m in zip(self.view_attention, sequences, masks, strict=True)]
        if missing:
            viewed = imagine(self.views_imagination, viewed, dropped)
        stacked = torch.stack(viewed, dim=1)
        fused = (weights[:, :, None, None] * stacked).sum(1)
        representation = (self.view_gate(fused).unsqueeze(-1) * fused).sum(1)
        told = self.head(representation)
        rows, which = torch.arange(len(dropped), device=dropped.device), lacked(dropped)
        return FlowOutput(
            prediction=told if self.classifies else told.squeeze(-1),
            representation=representation,
            rnc=self.rnc_head(representation),
            query=views[rows, FIRST_SINGLE + which],
            views=stacked[rows, which],
        )


def imagine(modules: nn.ModuleDict, vectors: Sequence[Tensor], dropped: Tensor) -> list[Tensor]:
    """Vectors [B, …, width] of the three modalities; what is dropped [B, 3] is imagined from all three.

    Every module runs for every batch, so that gradients of different ranks belong to the same parameters.
    """
    imagined = list(vectors)
    for name, module in modules.items():
        number = MODALITIES.index(name)
        chosen = dropped[:, number].reshape(-1, *[1] * (vectors[number].dim() - 1))
        imagined[number] = torch.where(chosen, module(*vectors), vectors[number])
    return imagined
