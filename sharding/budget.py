"""Batches by budget: how the samples of a step are laid over micro-steps and ranks so that none exceeds its memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Layout = list[list[list[int]]]  # [micro-step][rank] → sample indices
_ROUNDS = 30  # of the bisection that levels the slots


@dataclass(frozen=True, eq=False)
class Cost:
    """One resource that the samples of a slot share.

    Args:
        name: for messages.
        values: float [n], what each sample of the split takes.
        limit: most that one slot (a rank in a micro-step) may take.
        padded: the slot takes count × largest value, as padded tensors do; otherwise the sum.
    """

    name: str
    values: np.ndarray
    limit: float
    padded: bool

    def of(self, samples: Sequence[int] | np.ndarray) -> float:
        """What these samples take together in one slot."""
        if len(samples) == 0:
            return 0.0
        values = self.values[np.asarray(samples)]
        return float(values.max() * len(values) if self.padded else values.sum())


def weights(batch: np.ndarray, costs: Sequence[Cost]) -> np.ndarray:
    """Of each sample the largest share of a limit it takes by itself."""
    return np.max([cost.values[batch] / cost.limit for cost in costs], axis=0)


def cheapest(batch: np.ndarray, costs: Sequence[Cost]) -> int:
    """The sample of the batch that takes least."""
    return int(batch[np.argmin(weights(batch, costs))])


def compose(batch: np.ndarray, costs: Sequence[Cost], world_size: int, least: int = 1) -> Layout:
    """Lays the samples of a step over as few micro-steps as keep every slot within all limits.

    Samples are sorted by cost and cut into runs, so that a slot holds samples of like length and little padding; the
    slots are then levelled (the smallest common share of the limits that still needs no more of them), and those of
    one micro-step cost about the same on all ranks. A pure function of its arguments, the same on every rank.

    Args:
        batch: sample indices.
        costs: at least one; a sample that exceeds a limit by itself gets a slot of its own.
        world_size: ranks.
        least: least number of micro-steps.

    Returns:
        [micro-step][rank] → sample indices, slots of the highest cost first; each sample once, some slots empty.
    """
    order = np.lexsort((batch, -weights(batch, costs)))  # equal costs: by index, for determinism
    ranked = batch[order]
    micro_steps = max(least, -(-len(cut(ranked, costs, 1.0)) // world_size))
    slots = micro_steps * world_size
    low, high = 0.0, 1.0
    runs = cut(ranked, costs, high)
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        found = cut(ranked, costs, middle)
        if len(found) <= slots:
            high, runs = middle, found
        else:
            low = middle
    runs.sort(key=lambda run: -max(cost.of(run) / cost.limit for cost in costs))
    runs += [[] for _ in range(slots - len(runs))]
    return [runs[micro * world_size : (micro + 1) * world_size] for micro in range(micro_steps)]


def cut(ranked: np.ndarray, costs: Sequence[Cost], share: float) -> list[list[int]]:
    """Runs of samples that each stay within `share` of all limits, or hold one sample."""
    limits = [share * cost.limit for cost in costs]
    runs: list[list[int]] = []
    largest, total = [0.0] * len(costs), [0.0] * len(costs)
    for index, *values in zip(ranked.tolist(), *(cost.values[ranked].tolist() for cost in costs), strict=True):
        if runs:
            largest = list(map(max, largest, values))
            total = [before + value for before, value in zip(total, values, strict=True)]
            count = len(runs[-1]) + 1
            taken = (count * top if cost.padded else t for cost, top, t in zip(costs, largest, total, strict=True))
            if all(taking <= limit for taking, limit in zip(taken, limits, strict=True)):
                runs[-1].append(index)
                continue
        runs.append([index])
        largest, total = list(values), list(values)
    return runs


def oversized(costs: Sequence[Cost]) -> list[tuple[Cost, int]]:
    """Each limit that some sample exceeds by itself, with the largest such sample."""
    return [(cost, int(cost.values.argmax())) for cost in costs if (cost.values > cost.limit).any()]
