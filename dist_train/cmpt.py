"""Cross-modal proxy tokens (CMPT, arXiv 2501.17823), for three modalities of which any may be missing.

One learned token per modality that may be missing reads each modality that is there, and learns to come out as the
pooled vector of the missing one. The paper has two modalities and names three as future work; the extension is ours:

- In speech the tokens sit inside the encoder, which is tuned by adapters (`audio.tuning: lora`, rank 1). Vision enters
  as features and text as states of a causal model, so there the tokens sit in a layer of self-attention on top.
- What is missing is the mean of the proxies in the modalities that are there (the paper's hard gate with more than one
  source). Modality dropout is the recipe's `missing: random`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dist_train.missing import AUDIO
from dist_train.names import MODALITIES
from dist_train.promma import Attention


class Available(NamedTuple):
    """What CMPT needs of B clips beside their streams.

    heard [B, K, width]: the tokens' states in the speech encoder, None where audio comes as features; present [B, 3].
    """

    heard: Tensor | None
    present: Tensor


class Pooled(NamedTuple):
    """Of each modality: steps [B, T, d], mask [B, T], pooled vector [B, d]."""

    sequences: list[Tensor]
    masks: list[Tensor]
    vectors: list[Tensor]


class EncoderTokens:
    """Puts learned tokens in front of the frames of a speech encoder (WavLM, HuBERT, wav2vec 2.0).

    They come in where the frames enter the first layer: behind the positional convolution, which sees silence in their
    place, so that the frames enter as they would without.

    Args:
        encoder: the transformer of the speech encoder (`model.encoder`).
        count: tokens.
    """

    def __init__(self, encoder: Any, count: int) -> None:
        self.count = count
        self.tokens: Tensor | None = None
        encoder.register_forward_pre_hook(self.lengthen, with_kwargs=True)
        encoder.dropout.register_forward_hook(self.place)

    def lengthen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Empty frames in front, that count as real."""
        if self.tokens is None:
            return None
        frames, *rest = args if args else (kwargs.pop("hidden_states"),)
        kwargs["attention_mask"] = nn.functional.pad(kwargs["attention_mask"], (self.count, 0), value=1)
        return (nn.functional.pad(frames, (0, 0, self.count, 0)), *rest), kwargs

    def place(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """The tokens in the place of the empty frames."""
        if self.tokens is None:
            return None
        rows = self.tokens.to(output.dtype).expand(len(output), -1, -1)
        return torch.cat([rows, output[:, self.count :]], 1)


class Branch(nn.Module):
    """Tokens in a layer of self-attention over one modality's steps: [tokens; steps] → the tokens' states."""

    def __init__(self, count: int, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.tokens = nn.Parameter(nn.init.normal_(torch.empty(count, width), std=0.02))
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )

    def forward(self, steps: Tensor, mask: Tensor) -> Tensor:
        """steps [B, T, d], mask [B, T] → [B, K, d]."""
        count = len(self.tokens)
        joined = self.norm(torch.cat([self.tokens.to(steps.dtype).expand(len(steps), -1, -1), steps], 1))
        real = torch.cat([mask.new_ones(len(mask), count), mask], 1)
        states = joined[:, :count] + self.attention(joined[:, :count], joined, real)
        return states + self.mlp(states)


class CMPT(nn.Module):
    """Proxies of what may be missing, out of what is there.

    Args:
        targets: names of the modalities that may be missing.
        heard_width: width of the speech encoder's states, None where audio comes as features.
        width: of the pooled vectors (d).
    """

    def __init__(
        self, targets: Sequence[str], heard_width: int | None, width: int, *, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.targets = [MODALITIES.index(name) for name in targets]
        sources = [number for number in range(3) if self.targets != [number]]  # none reads itself
        self.hear = None if heard_width is None or AUDIO not in sources else nn.Linear(heard_width, width)
        self.branches = nn.ModuleDict(
            {
                MODALITIES[number]: Branch(len(self.targets), width, heads, dropout)
                for number in sources
                if number != AUDIO or heard_width is None
            }
        )

    def forward(self, sequences: Sequence[Tensor], masks: Sequence[Tensor], heard: Tensor | None) -> dict[str, Tensor]:
        """Projected sequences [B, T, d] of the complete flow → proxies [B, K, d] by source; see `pairs` for which of
        them mean something.
        """
        found: dict[str, Tensor] = {}
        if self.hear is not None and heard is not None:
            found[MODALITIES[AUDIO]] = self.hear(heard.to(sequences[0].dtype))
        for name, branch in self.branches.items():
            number = MODALITIES.index(name)
            found[name] = branch(sequences[number], masks[number])
        return dict(sorted(found.items()))

    def pairs(self, proxies: dict[str, Tensor]) -> list[tuple[int, int, Tensor]]:
        """(source, target, proxy [B, d]) of all pairs; a modality is no source of itself."""
        return [
            (source, target, states[:, place])
            for source, states in ((MODALITIES.index(name), states) for name, states in proxies.items())
            for place, target in enumerate(self.targets)
            if source != target
        ]

    def fill(self, seen: Pooled, proxies: dict[str, Tensor], present: Tensor, dropped: Tensor) -> Pooled:
        """In the place of each dropped modality the mean of its proxies in what is there, if any is: as its vector, and
        as its first step, which is its only one (a zero step by itself).

        Args:
            present, dropped: bool [B, 3].
        """
        filled = Pooled(*(list(part) for part in seen))
        there = present & ~dropped
        for target in self.targets:
            of = [(source, proxy) for source, goal, proxy in self.pairs(proxies) if goal == target]
            weights = torch.stack([there[:, source] for source, _ in of], 1).to(of[0][1].dtype)
            mean = (torch.stack([proxy for _, proxy in of], 1) * weights[..., None]).sum(1)
            mean = mean / weights.sum(1, keepdim=True).clamp(min=1)
            use = dropped[:, target] & (weights.sum(1) > 0)
            filled.vectors[target] = torch.where(use[:, None], mean, seen.vectors[target])
            steps = seen.sequences[target]
            first = torch.where(use[:, None], mean, steps[:, 0])
            filled.sequences[target] = torch.cat([first[:, None], steps[:, 1:]], 1)
        return filled

    def distances(self, pooled: Sequence[Tensor], proxies: dict[str, Tensor], present: Tensor) -> Tensor:
        """[B, pairs, 3]: mean square of proxy minus target, and of proxy minus its own modality's vector; whether the
        clip counts (complete clips do).
        """
        complete = present.all(1).float()
        rows = []
        for source, target, proxy in self.pairs(proxies):
            to = [(proxy.float() - pooled[place].float()).square().mean(1) for place in (target, source)]
            rows.append(torch.stack([*to, complete], 1))
        return torch.stack(rows, 1)
