"""Figures of a classifier against scikit-learn and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.patches import Rectangle
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, recall_score

from dist_train.class_figures import confusions, recall, wilson
from dist_train.metrics import by_class

CLASSES = ["calm", "angry", "sad", "never"]  # no clip is of the last


def test_intervals_equal_scipys() -> None:
    rng = np.random.default_rng()
    clips = rng.integers(1, 60, 20)
    hits = np.array([rng.integers(0, n + 1) for n in clips])
    low, high = wilson(hits / clips, clips)
    for row in range(20):
        expected = binomtest(int(hits[row]), int(clips[row])).proportion_ci(0.95, method="wilson")
        assert (low[row], high[row]) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_counts_of_each_class_equal_sklearns() -> None:
    rng = np.random.default_rng()
    label = np.concatenate([np.arange(3), rng.integers(0, 3, 30)])
    logits = {flow: rng.normal(size=(33, 4)) for flow in ("complete", "missing")}
    found = by_class(logits, label, CLASSES)
    for flow, values in logits.items():
        said = values.argmax(1)
        assert found["confusion"][flow] == confusion_matrix(label, said, labels=range(4)).tolist()
        *known, never = found["recall"][flow].values()
        assert known == pytest.approx(recall_score(label, said, labels=range(3), average=None)) and never is None


@pytest.mark.parametrize("count", [2, 8, 30, 60])
def test_what_is_drawn_is_what_was_counted(count: int) -> None:
    rng = np.random.default_rng()
    names = [f"class {place}" for place in range(count)]
    label = rng.integers(0, count, 80).astype(float)
    said = {flow: rng.integers(0, count, 80).astype(float) for flow in ("complete", "missing")}
    panels = [axes for axes in confusions(label, said, names).axes if axes.images]
    there = sorted(set(label.astype(int)))
    (bars,) = recall(label, said, names).axes
    sizes = [bar.get_width() if count > 10 else bar.get_height() for bar in bars.patches if isinstance(bar, Rectangle)]
    drawn = np.split(np.array(sizes), 2)
    for axes, places, shares in zip(panels, said.values(), drawn, strict=True):
        matrix = confusion_matrix(label, places, labels=range(count), normalize="true")
        np.testing.assert_allclose(np.asarray(axes.images[0].get_array()), matrix, atol=1e-12)
        np.testing.assert_allclose(shares, np.diag(matrix)[there], atol=1e-12)
