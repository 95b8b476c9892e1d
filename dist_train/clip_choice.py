"""Which clips of a run are shown one by one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

APART, WRONG, TYPICAL = 3, 3, 2  # clips of each kind


class Chosen(NamedTuple):
    """A row of the predictions, and the rule that chose it."""

    row: int
    rule: str


def apart_and_wrong(label: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far the flows are from each other [n], and their errors [2, n]. Of probabilities: total variation distance,
    and what that of the label lacks of 1.

    Args:
        label: [n] numbers, or places of classes.
        predicted: [2, n] numbers of both flows, or [2, n, C] probabilities of classes.
    """
    apart = np.abs(predicted[0] - predicted[1])
    if predicted.ndim == 2:
        return apart, np.abs(predicted - label)
    right = np.take_along_axis(predicted, label.astype(int)[None, :, None], 2)[:, :, 0]
    return apart.sum(1) / 2, 1 - right.clip(0, 1)


def choose(label: np.ndarray, predicted: np.ndarray, keys: list[str]) -> list[Chosen]:
    """First the clips on which the flows differ most, then those with the largest error of either flow, then those
    whose mean error of both flows is nearest to its median. A clip is taken once; ties go by key. Arrays as in
    `apart_and_wrong`.
    """
    apart, errors = apart_and_wrong(label, predicted)
    mean = errors.mean(0)
    ranks = {
        "apart": (-apart, APART),
        "wrong": (-errors.max(0), WRONG),
        "typical": (np.abs(mean - np.median(mean)), TYPICAL),
    }
    chosen: list[Chosen] = []
    for rule, (rank, count) in ranks.items():
        taken = {one.row for one in chosen}
        order = (row for row in sorted(range(len(label)), key=lambda row: (rank[row], keys[row])) if row not in taken)
        chosen += [Chosen(row, rule) for row, _ in zip(order, range(count), strict=False)]
    return chosen
