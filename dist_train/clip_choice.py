"""Which clips of a run are shown one by one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dist_train.names import FLOWS

APART, WRONG, TYPICAL = 3, 3, 2  # clips of each kind


class Chosen(NamedTuple):
    """A row of the predictions, and the rule that chose it."""

    row: int
    rule: str


def choose(label: np.ndarray, flows: dict[str, np.ndarray], keys: list[str]) -> list[Chosen]:
    """First the clips on which the flows differ most, then those with the largest error of either flow, then those
    whose mean error of both flows is nearest to its median. A clip is taken once; ties go by key. Arrays [n].
    """
    predicted = np.stack([flows[flow] for flow in FLOWS])
    errors = np.abs(predicted - label)
    mean = errors.mean(0)
    ranks = {
        "apart": (-np.abs(predicted[0] - predicted[1]), APART),
        "wrong": (-errors.max(0), WRONG),
        "typical": (np.abs(mean - np.median(mean)), TYPICAL),
    }
    chosen: list[Chosen] = []
    for rule, (rank, count) in ranks.items():
        taken = {one.row for one in chosen}
        order = (row for row in sorted(range(len(label)), key=lambda row: (rank[row], keys[row])) if row not in taken)
        chosen += [Chosen(row, rule) for row, _ in zip(order, range(count), strict=False)]
    return chosen
