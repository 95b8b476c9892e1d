"""How well the similarity of representations follows the label: one number for each matrix of distances."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dist_train.figures import distances


class LabelOrder(NamedTuple):
    """Spearman correlation of distance and label difference over pairs of different clips: 1 where nearer labels are
    nearer clips, 0 where there is no order. Within either flow, and from the complete to the missing one. Classes
    differ or do not, by no amount.

    gap: mean distance of a clip's two flows, by that of different clips' (0: the flows agree).
    """

    complete: float
    missing: float
    between: float
    gap: float


def by_label(complete: np.ndarray, missing: np.ndarray, label: np.ndarray, *, nominal: bool) -> LabelOrder | None:
    """Of representations of both flows [n, d] and label [n]; None where nothing differs, or of fewer than three clips.

    Args:
        nominal: labels are places of classes, in no order.
    """
    if len(label) < 3 or np.ptp(label) == 0:
        return None
    apart = (label[:, None] != label[None]).astype(float) if nominal else np.abs(label[:, None] - label[None])
    different = ~np.eye(len(label), dtype=bool)
    between = distances(complete, missing)
    one, two, across = (
        spearman(matrix[different], apart[different])
        for matrix in (distances(complete, complete), distances(missing, missing), between)
    )
    other = between[different].mean()
    values = LabelOrder(one, two, across, float(np.diag(between).mean() / other) if other > 0 else np.nan)
    return values if np.isfinite(values).all() else None


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation [n], [n]; NaN of a constant."""
    a, b = (ranks - ranks.mean() for ranks in (average_ranks(a), average_ranks(b)))
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 0 else np.nan


def average_ranks(values: np.ndarray) -> np.ndarray:
    """[n] ranks from 0; ties have the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[which]
