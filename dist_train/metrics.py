"""Metrics of a flow, their trivial floors, and the gap between the two flows: of valence in [-3, 3] (the MOSEI
conventions), and of classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn.functional import l1_loss

from dist_train.task import confusion

Metrics = dict[str, float | None]


def _vector(values: ArrayLike | Tensor) -> Tensor:
    vector = torch.as_tensor(values, dtype=torch.float64, device="cpu").flatten()
    if not len(vector):
        raise ValueError("metrics of no clips")
    if not vector.isfinite().all():
        raise ValueError("metrics of non-finite values")
    return vector


def _seven_classes(valence: Tensor) -> Tensor:
    return valence.clamp(-3, 3).round().long() + 3


def _binary(prediction: Tensor, label: Tensor) -> tuple[float | None, float | None]:
    """Accuracy and class-weighted F1 of two bool vectors; None for both if they are empty."""
    if not len(label):
        return None, None
    from torchmetrics.functional.classification import binary_accuracy, multiclass_f1_score  # noqa: PLC0415  see below

    classes = prediction.long(), label.long()
    return binary_accuracy(*classes).item(), multiclass_f1_score(*classes, num_classes=2, average="weighted").item()


def valence_metrics(prediction: ArrayLike | Tensor, label: ArrayLike | Tensor) -> Metrics:
    """Seven metrics of one flow.

    Args:
        prediction, label: [n] valence; n >= 1.

    Returns:
        ``mae``; ``corr`` (Pearson's r, 0 if either side is constant); ``acc2_nonzero`` and ``f1_nonzero`` (clips with a
        non-zero label, positive means > 0; None if there is none); ``acc2_has0`` and ``f1_has0`` (all clips, positive
        means >= 0); ``acc7`` (equality after clipping to [-3, 3] and rounding half to even). F1 is weighted by class
        frequency. All but mae and corr are fractions of 1.

    Raises:
        ValueError: no clips, two lengths, or a value that is not finite.
    """
    from torchmetrics.functional.classification import multiclass_accuracy  # noqa: PLC0415  takes a second to import

    prediction, label = _vector(prediction), _vector(label)
    if len(prediction) != len(label):
        raise ValueError(f"{len(prediction)} predictions for {len(label)} labels")
    constant = any(bool(x.min() == x.max()) for x in (prediction, label))
    nonzero = label != 0
    acc2_nonzero, f1_nonzero = _binary(prediction[nonzero] > 0, label[nonzero] > 0)
    acc2_has0, f1_has0 = _binary(prediction >= 0, label >= 0)
    seven = (_seven_classes(prediction), _seven_classes(label))
    return {
        "mae": l1_loss(prediction, label).item(),
        # torchmetrics' Pearson warns at every evaluation of a model that is still nearly constant.
        "corr": 0.0 if constant else torch.corrcoef(torch.stack((prediction, label)))[0, 1].item(),
        "acc2_nonzero": acc2_nonzero,
        "acc2_has0": acc2_has0,
        "f1_nonzero": f1_nonzero,
        "f1_has0": f1_has0,
        "acc7": multiclass_accuracy(*seven, num_classes=7, average="micro").item(),
    }


def floors(train_labels: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> Metrics:
    """What a model that has seen nothing of a clip reaches on `labels`.

    Args:
        train_labels: [m] labels of the training split.
        labels: [n] labels of the evaluated split.

    Returns:
        ``mae`` of the constant prediction "median of the *training* labels"; ``acc2_nonzero`` (None without a non-zero
        label) and ``acc2_has0`` of the constant answer "positive".
    """
    median = float(np.median(_vector(train_labels).numpy()))
    labels = _vector(labels)
    positive = valence_metrics(torch.ones_like(labels), labels)
    return {
        "mae": l1_loss(torch.full_like(labels, median), labels).item(),
        "acc2_nonzero": positive["acc2_nonzero"],
        "acc2_has0": positive["acc2_has0"],
    }


def class_metrics(prediction: ArrayLike | Tensor, label: ArrayLike | Tensor, classes: int) -> Metrics:
    """Four metrics of one flow of a classifier.

    Args:
        prediction, label: [n] places of classes; n >= 1.
        classes: how many there are.

    Returns:
        ``accuracy``; ``macro_f1`` (mean over the classes that are a label or a prediction), ``weighted_f1`` (by how
        many labels a class has); ``uar`` (unweighted average recall: mean over the classes that are a label). Fractions
        of 1.

    Raises:
        ValueError: no clips, two lengths, or a value that is not finite.
    """
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score  # noqa: PLC0415

    predicted, true = _vector(prediction).long(), _vector(label).long()
    if len(predicted) != len(true):
        raise ValueError(f"{len(predicted)} predictions for {len(true)} labels")
    known = [recall for recall in recalls(predicted, true, classes) if recall is not None]
    return {
        "macro_f1": multiclass_f1_score(predicted, true, num_classes=classes, average="macro").item(),
        "accuracy": multiclass_accuracy(predicted, true, num_classes=classes, average="micro").item(),
        "weighted_f1": multiclass_f1_score(predicted, true, num_classes=classes, average="weighted").item(),
        "uar": float(np.mean(known)),
    }


def recalls(prediction: ArrayLike, label: ArrayLike, classes: int) -> list[float | None]:
    """[C] share of each class's clips that are found; None of a class without clips."""
    rows = confusion(prediction, label, classes).tolist()
    return [row[place] / sum(row) if sum(row) else None for place, row in enumerate(rows)]


def class_floors(train_labels: ArrayLike | Tensor, labels: ArrayLike | Tensor, classes: int) -> Metrics:
    """Metrics of the constant answer "the commonest class of the training split" (the first of several).

    Args:
        train_labels: [m] labels of the training split.
        labels: [n] labels of the evaluated split.
    """
    labels = _vector(labels)
    commonest = torch.bincount(_vector(train_labels).long(), minlength=classes).argmax()
    return class_metrics(commonest.expand(len(labels)), labels, classes)


def predicted_classes(prediction: np.ndarray) -> np.ndarray:
    """Numbers [n] as they are; of logits [n, C] the place of the largest (of equal ones the first)."""
    return prediction if prediction.ndim == 1 else prediction.argmax(1).astype(np.float64)


def task_metrics(prediction: np.ndarray, label: np.ndarray) -> Metrics:
    """Metrics of one flow: numbers [n], or logits [n, C], against labels [n]."""
    if prediction.ndim == 1:
        return valence_metrics(prediction, label)
    return class_metrics(predicted_classes(prediction), label, prediction.shape[1])


def task_floors(prediction: np.ndarray, train_labels: np.ndarray, label: np.ndarray) -> Metrics:
    """Floors of what `prediction` is: numbers [n], or logits [n, C]."""
    return (
        floors(train_labels, label) if prediction.ndim == 1 else class_floors(train_labels, label, prediction.shape[1])
    )


def by_class(predictions: dict[str, np.ndarray], label: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """What is said of each class, by flow: `confusion`, and `recall` by its name.

    Args:
        predictions: of each flow, logits [n, C].
    """
    placed = {flow: predicted_classes(logits) for flow, logits in predictions.items()}
    return {
        "confusion": {flow: confusion(places, label, len(classes)).tolist() for flow, places in placed.items()},
        "recall": {
            flow: dict(zip(classes, recalls(places, label, len(classes)), strict=True))
            for flow, places in placed.items()
        },
    }


def gap(complete: Metrics, missing: Metrics) -> Metrics:
    """Missing flow minus complete flow, per metric (mae: positive means worse without text; the others: negative does).

    None where either side is None.
    """
    differences: Metrics = {}
    for name, of_complete in complete.items():
        of_missing = missing[name]
        differences[name] = None if of_complete is None or of_missing is None else of_missing - of_complete
    return differences
