"""Metrics against plain numpy and values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.metrics import floors, gap, valence_metrics

# Multiples of 1/3 as in MOSEI (ties, zeros, halves when averaged) and beyond the label range for predictions.
VALENCE = st.sampled_from([k / 3 for k in range(-9, 10)] + [0.5, -0.5, 1.5, -2.5])
PREDICTION = VALENCE | st.floats(-5, 5, width=32)


def weighted_f1(prediction: np.ndarray, truth: np.ndarray) -> float:
    total = 0.0
    for positive in (False, True):
        hits = np.sum((prediction == positive) & (truth == positive))
        said, true = np.sum(prediction == positive), np.sum(truth == positive)
        total += true * (2 * hits / (said + true) if said + true else 0.0)
    return total / len(truth)


def numpy_metrics(prediction: np.ndarray, label: np.ndarray) -> dict[str, float | None]:
    kept = label != 0
    centred = prediction - prediction.mean(), label - label.mean()
    constant = np.ptp(prediction) == 0 or np.ptp(label) == 0
    norm = np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
    return {
        "mae": np.abs(prediction - label).mean(),
        "corr": 0.0 if constant else (centred[0] * centred[1]).sum() / norm,
        "acc2_nonzero": np.mean((prediction[kept] > 0) == (label[kept] > 0)) if kept.any() else None,
        "acc2_has0": np.mean((prediction >= 0) == (label >= 0)),
        "f1_nonzero": weighted_f1(prediction[kept] > 0, label[kept] > 0) if kept.any() else None,
        "f1_has0": weighted_f1(prediction >= 0, label >= 0),
        "acc7": np.mean(np.round(np.clip(prediction, -3, 3)) == np.round(np.clip(label, -3, 3))),
    }


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(PREDICTION, VALENCE), min_size=1, max_size=12))
def test_equals_numpy(rows: list[tuple[float, float]]) -> None:
    prediction, label = np.array(rows, dtype=np.float64).T
    # A spread lost in the rounding of float64 has no correlation to compare.
    if 0 < np.ptp(prediction) < 1e-6:
        prediction = prediction.round(4)
    assert valence_metrics(prediction, label) == pytest.approx(numpy_metrics(prediction, label), abs=1e-6)


def test_by_hand() -> None:
    metrics = valence_metrics(torch.tensor([2.5, -0.2, 0.0, -4.0, 0.6]), torch.tensor([3.0, 0.0, -1.0, -3.0, 1.0]))
    assert metrics["mae"] == pytest.approx((0.5 + 0.2 + 1 + 1 + 0.4) / 5)
    # Non-zero labels: +, -, -, + answered +, not +, -, +.
    assert metrics["acc2_nonzero"] == 1.0
    # With zero: +, +, -, -, + answered +, -, +, -, +.
    assert metrics["acc2_has0"] == pytest.approx(3 / 5)
    # Rounded half to even: 2, 0, 0, -3, 1 against 3, 0, -1, -3, 1.
    assert metrics["acc7"] == pytest.approx(3 / 5)


@pytest.mark.parametrize("constant", [0.0, 0.1, -2.7])
def test_constant_prediction_has_no_correlation(constant: float) -> None:
    label = torch.randn(37)
    assert valence_metrics(torch.full((37,), constant), label)["corr"] == 0.0
    assert valence_metrics(label, torch.full((37,), constant))["corr"] == 0.0


def test_only_zero_labels_have_no_sign() -> None:
    metrics = valence_metrics([0.3, -1.0], [0.0, 0.0])
    assert metrics["acc2_nonzero"] is None and metrics["f1_nonzero"] is None
    assert metrics["acc2_has0"] == 0.5
    assert floors([1.0], [0.0, 0.0])["acc2_nonzero"] is None


def test_floors_take_the_median_of_the_training_labels() -> None:
    labels = [3.0, 0.0, -1.0, 2.0]
    floor = floors([0.0, 1.0, 2.0, 30.0], labels)
    assert floor["mae"] == pytest.approx((1.5 + 1.5 + 2.5 + 0.5) / 4)
    assert floor["acc2_nonzero"] == pytest.approx(2 / 3)
    assert floor["acc2_has0"] == pytest.approx(3 / 4)


def test_gap_is_missing_minus_complete() -> None:
    label = np.random.default_rng().choice([-1.0, 1.0], 20)
    difference = gap(valence_metrics(label, label), valence_metrics(-label, label))
    assert difference["mae"] == pytest.approx(2) and difference["acc2_nonzero"] == pytest.approx(-1)
    assert gap(valence_metrics([1.0], [0.0]), valence_metrics([1.0], [0.0]))["acc2_nonzero"] is None


@pytest.mark.parametrize("prediction, label", [([], []), ([1.0, 2.0], [1.0]), ([float("nan"), 1.0], [1.0, 2.0])])
def test_refuses_what_has_no_metric(prediction: list[float], label: list[float]) -> None:
    with pytest.raises(ValueError, match=r"metrics of|predictions for"):
        valence_metrics(prediction, label)
