"""Missing-modality imagination (MIA): repairs the missing flow's text vectors from the other modalities."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

Skip = Literal["text", "transition"]


class ImaginationSettings(BaseModel):
    """The imagination modules of the missing flow: two for each modality that it may lack."""

    model_config = ConfigDict(extra="forbid")

    enabled: bool = Field(default=True, description="Apply MIA-1 and MIA-2 in the missing flow. Default: true.")
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
