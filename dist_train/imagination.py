"""Missing-modality imagination (MIA): repairs the missing flow's text vectors from the other modalities."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_train.kinds import OfKind

Skip = Literal["text", "transition"]


class ImaginationSettings(OfKind):
    """How the missing flow makes up for what it lacks."""

    kind: Literal["mia", "cmpt", "promma"] = Field(
        default="mia",
        description="`mia` (SDUMC): two modules for each modality that may be missing, MIA-1 and MIA-2. `cmpt`: "
        "proxy tokens in the modalities that are there stand for the missing one. `promma`: "
        "prompts, weights by mutual information, and an evaluator that judges whether imagining a clip's text is worth "
        "it. `imagination: promma` is short for imagination.kind. Default: mia.",
    )
    enabled: bool = Field(default=True, description="Apply any of it. Default: true.")
    skip: Skip = Field(
        default="text",
        description="Start of the residual connection: `text` (what comes in for the missing modality: the simulated "
        "text, or nothing for another modality) or `transition` "
        "(the output of the transition layers). Default: text.",
    )
    pooled_bottleneck: int = Field(
        default=128,
        ge=1,
        description="Width of the bottleneck of MIA-1, which acts on the pooled text vector. Default: 128.",
    )
    views_bottleneck: int = Field(
        default=64,
        ge=1,
        description="Width of the bottleneck of MIA-2, which acts on the seven text views. Default: 64.",
    )
    prompts: int = Field(default=4, ge=1, description="With `promma`: shared prompts, and as many private ones.")
    levels: int = Field(default=2, ge=1, description="With `promma`: layers of self-attention in each modality.")
    heads: int = Field(default=4, ge=1, description="With `cmpt` and `promma`: attention heads; divides fusion.width.")
    threshold: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="With `promma`: at inference text is imagined for clips that are judged worth it with this "
        "probability or more. 0: for all.",
    )

    @property
    def mia(self) -> bool:
        """Whether there are MIA modules."""
        return self.enabled and self.kind == "mia"

    @property
    def cmpt(self) -> bool:
        """Whether there are CMPT's proxy tokens."""
        return self.enabled and self.kind == "cmpt"

    @property
    def promma(self) -> bool:
        """Whether there are ProMMA's parts."""
        return self.enabled and self.kind == "promma"


class MIA(nn.Module):
    """One imagination module: transition over the three modalities, then one residual auto-encoder block.

    The paper imagines text; here it may be any of the three, by the same equations.

    ``t = Linear(ReLU(Linear([audio; text; vision])))``; output ``= Linear(Linear(t)) + skip``, where skip is the
    incoming text or ``t``. Source: SDUMC (arXiv 2410.15029), section II, and its released code (whose two files differ
    in the skip).

    Args:
        width: features of each modality and of the output.
        bottleneck: width between the two linears of the residual block.
        skip: where the residual connection starts, see :class:`ImaginationSettings`.
        modality: number of the modality that is imagined.
    """

    def __init__(self, width: int, bottleneck: int, skip: Skip, modality: int) -> None:
        super().__init__()
        self.skip, self.modality = skip, modality
        self.transition = nn.Sequential(nn.Linear(3 * width, width), nn.ReLU(), nn.Linear(width, width))
        self.encoder = nn.Linear(width, bottleneck)
        self.decoder = nn.Linear(bottleneck, width)

    def forward(self, *vectors: Tensor) -> Tensor:
        """Audio, text and vision [..., width] to the imagined modality [..., width]."""
        transition = self.transition(torch.cat(vectors, dim=-1))
        start = vectors[self.modality] if self.skip == "text" else transition
        return self.decoder(self.encoder(transition)) + start
