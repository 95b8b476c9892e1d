"""How well the similarity of representations follows the label: one number for each matrix of distances."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dist_train.figures import distances


class LabelOrder(NamedTuple):
    """Over pairs of different clips: 1 where nearer labels are nearer clips, 0 where there is no order. Spearman
    correlation of distance and label difference; of classes, which differ or do not, the rank-biserial correlation of
    distance and difference (2 AUC - 1), since ties would keep Spearman's below 1. Within either flow, and from the
    complete to the missing one.

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
    different = ~np.eye(len(label), dtype=bool)
    apart = np.abs(label[:, None] - label[None])[different]
    between = distances(complete, missing)
    one, two, across = (
        rank_biserial(matrix[different], apart > 0) if nominal else spearman(matrix[different], apart)
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


def rank_biserial(values: np.ndarray, far: np.ndarray) -> float:
    """By how much of all pairs values [n] are larger where `far` [n] is true than where not (Glass, 1966: 2 AUC - 1);
    NaN where it is the same everywhere.
    """
    ranks = average_ranks(values)
    return float(2 * (ranks[far].mean() - ranks[~far].mean()) / len(ranks)) if 0 < far.sum() < len(far) else np.nan


def average_ranks(values: np.ndarray) -> np.ndarray:
    """[n] ranks from 0; ties have the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[which]
