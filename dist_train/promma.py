"""ProMMA: judge before imagining, private and shared prompts, and weights by mutual information.

Of the paper (arXiv 2604.05558) no more than the abstract is known, and its repository has no code. It names the parts;
how they compute is our own design, said in each docstring:

- Missing modality evaluator: whether imagining a clip's text is worth it (:class:`Evaluator`).
- MiPD: prompts that are private to a modality, split from shared ones (:class:`Prompts`).
- DPW: weights from mutual information that damp the modality that is imagined (:class:`Weights`).
- MPDC: the shared prompts are added to self-attention outputs at several levels (:class:`Level`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from dist_train.packed import TextStates


class Evaluator(nn.Module):
    """Whether imagining the text of a clip is worth it, from what the clip has: a logit.

    Each modality is projected, averaged over its real steps, and the vectors go through two layers. Trained on
    pseudo-labels: whether the error of the missing flow, as it is now, is smaller with the imagined text than without
    (squared error, or cross-entropy of classes). At inference a clip below the threshold is not given to the language
    model at all.

    Args:
        widths: features per step of the modalities that are there.
    """

    def __init__(self, widths: Sequence[int], width: int) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(inputs, width) for inputs in widths)
        self.judge = nn.Sequential(nn.Linear(len(widths) * width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, streams: Sequence[TextStates]) -> Tensor:
        """Streams of B clips → [B] logits. What feeds the streams learns nothing from it."""
        means = []
        for projection, (states, mask) in zip(self.projections, streams, strict=True):
            real = mask[..., None].to(states.dtype)
            means.append(torch.tanh((projection(states.detach()) * real).sum(1) / real.sum(1)))
        return self.judge(torch.cat(means, -1)).squeeze(-1)


class Prompts(nn.Module):
    """Shared prompts, and those private to each modality, split from them: shared + MLP(shared) + state.

    The state is one learned vector per modality for "there" and one for "imagined".

    Args:
        count: prompts of each kind.
    """

    def __init__(self, count: int, width: int, modalities: int) -> None:
        super().__init__()
        self.shared = nn.Parameter(nn.init.normal_(torch.empty(count, width), std=0.02))
        self.states = nn.Parameter(nn.init.normal_(torch.empty(modalities, 2, width), std=0.02))
        self.split = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(modalities)
        )

    def forward(self, imagined: Tensor) -> tuple[Tensor, list[Tensor]]:
        """imagined [B, 3] bool → shared prompts [P, d], private ones of each modality [B, P, d]."""
        shared = self.shared.clone()  # ZeRO-3 takes the parameter away again at the end
        private = []
        for number, split in enumerate(self.split):
            state = self.states[number][imagined[:, number].long()]
            private.append((shared + split(shared))[None] + state[:, None])
        return shared, private


class Attention(nn.Module):
    """Multi-head attention out of plain linear layers: torch's own reads the weights of its last one without running
    it, which ZeRO-3 does not see.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, asking: Tensor, steps: Tensor, mask: Tensor) -> Tensor:
        """asking [B, Q, d], steps [B, T, d], mask [B, T] (True = real; at least one per clip) → [B, Q, d]."""
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.query, asking), (self.key, steps), (self.value, steps))
        )
        dropout = self.dropout if self.training else 0.0
        mixed = scaled_dot_product_attention(query, key, value, mask[:, None, None], dropout)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Level(nn.Module):
    """Self-attention within one modality; the shared prompts are added to its output through a residual link."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.link = nn.Linear(width, width)

    def forward(self, steps: Tensor, mask: Tensor, shared: Tensor) -> Tensor:
        """steps [B, T, d], mask [B, T], shared prompts [P, d] → [B, T, d]."""
        x = self.norm(steps)
        return steps + self.attention(x, x, mask) + self.link(shared.mean(0))


class Weights(nn.Module):
    """How much an imagined modality tells of the others, in [0, 1): its weight. What is there weighs 1.

    The shared prompts look at each modality (cross-attention). For a pair of jointly Gaussian scalars with correlation
    rho the mutual information is ``I = -log(1 - rho²) / 2``, so ``1 - exp(-2 I) = rho²``: the weight is the squared
    cosine between the modality's vector and the mean of the others', each through a linear layer.
    """

    def __init__(self, width: int, heads: int, modalities: int) -> None:
        super().__init__()
        self.look = Attention(width, heads)
        self.own = nn.ModuleList(nn.Linear(width, width) for _ in range(modalities))

    def forward(self, sequences: Sequence[Tensor], masks: Sequence[Tensor], shared: Tensor, imagined: Tensor) -> Tensor:
        """Sequences [B, T, d] and masks of the modalities, shared prompts [P, d], imagined [B, 3] → weights [B, 3]."""
        seen = []
        for steps, mask, own in zip(sequences, masks, self.own, strict=True):
            query = shared.expand(len(steps), -1, -1)
            seen.append(own(self.look(query, steps, mask).mean(1)).float())
        weights = []
        for number, vector in enumerate(seen):
            others = torch.stack([other for place, other in enumerate(seen) if place != number]).mean(0)
            weights.append(torch.cosine_similarity(vector, others, dim=-1).square())
        return torch.where(imagined, torch.stack(weights, 1), 1.0)


class ProMMA(nn.Module):
    """Prompts, levels and weights over the projected sequences of one flow.

    Args:
        width: features per step (d).
        prompts: of each kind, that join each sequence.
        levels: of self-attention.
        heads: of each attention.
    """

    def __init__(self, width: int, *, modalities: int, prompts: int, levels: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.prompts = Prompts(prompts, width, modalities)
        self.levels = nn.ModuleList(
            nn.ModuleList(Level(width, heads, dropout) for _ in range(levels)) for _ in range(modalities)
        )
        self.weights = Weights(width, heads, modalities)

    def forward(
        self, sequences: Sequence[Tensor], masks: Sequence[Tensor], imagined: Tensor
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Sequences [B, T, d], masks [B, T] → sequences [B, P + T, d], masks [B, P + T], weights [B, 3].

        Args:
            imagined: bool [B, 3].
        """
        shared, private = self.prompts(imagined)
        found, longer = [], []
        for steps, mask, own, levels in zip(sequences, masks, private, self.levels, strict=True):
            joined = torch.cat([own.to(steps.dtype), steps], 1)
            real = torch.cat([mask.new_ones(own.shape[:2]), mask], 1)
            for level in levels.children():
                joined = level(joined, real, shared)
            found.append(joined)
            longer.append(real)
        weights = self.weights(found, longer, shared, imagined)
        damped = [steps * weight[:, None, None].to(steps.dtype) for steps, weight in zip(found, weights.T, strict=True)]
        return damped, longer, weights
