"""What is predicted of a clip: a number (valence), or one of several classes; and what either is judged by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field, ValidationError

from dist_train.kinds import OfKind
from sharding.errors import UserError, UserErrors
from sharding.shards import class_problems

Kind = Literal["regression", "classification"]
MOST_NAMED = 8  # clips in a message


class TaskSettings(OfKind):
    """What is predicted."""

    kind: Kind = Field(
        "regression",
        description="`regression` of the label (valence), or `classification`. `task: classification` is short for "
        "task.kind. Default: regression.",
    )
    classes: list[str] = Field(
        default_factory=list,
        description="Names of the classes; a label is the place of one, from 0. Default: as the dataset names them.",
    )
    thresholds: list[float] = Field(
        default_factory=list,
        description="Makes classes of labels that are numbers: rising bounds, one less than classes. A label is of the "
        "class after as many bounds as are at most as large. Default: labels are classes already.",
    )

    @property
    def classifies(self) -> bool:
        """Whether classes are predicted."""
        return self.kind == "classification"

    def conflicts(self) -> Iterator[UserError]:
        """What is wrong with it as a whole."""
        if not self.classifies:
            for name in ("classes", "thresholds"):
                if getattr(self, name):
                    yield UserError(
                        f"task.{name}", "has no meaning in regression", "Write task.kind: classification, or remove it."
                    )
            return
        for problem, remedy in class_problems(self.classes) if self.classes else ():
            yield UserError("task.classes", problem, f"{remedy}.")
        if self.thresholds and len(self.thresholds) != len(self.classes) - 1:
            yield UserError(
                "task.thresholds",
                f"has {len(self.thresholds)} bounds for {len(self.classes)} classes",
                "Write one bound less than task.classes has names.",
            )
        if any(upper <= lower for lower, upper in zip(self.thresholds, self.thresholds[1:], strict=False)):
            yield UserError("task.thresholds", "does not rise", "Write the smallest bound first.")

    def fitted(self, classes: Sequence[str] | None, dataset: str) -> TaskSettings:
        """With the dataset's names of classes.

        Args:
            classes: that dataset.json names; None where labels are numbers.
            dataset: its name, for messages.

        Raises:
            UserError: recipe and dataset contradict each other.
        """
        told = ", ".join(classes or ())
        if not self.classifies:
            if classes is not None:
                raise UserError(
                    "task.kind", f"is regression, but {dataset} has classes ({told})", "Write task: classification."
                )
            return self
        if self.thresholds and classes is not None:
            raise UserError("task.thresholds", f"bounds numbers, but {dataset} has classes ({told})", "Leave it out.")
        if not self.classes and classes is None:
            raise UserError(
                "task.classes",
                f"is missing, and {dataset} names none",
                "Write task.classes: [first, second, …], or make the shards with --classes.",
            )
        if self.classes and classes is not None and self.classes != list(classes):
            raise UserError(
                "task.classes",
                f"is {', '.join(self.classes)}, but {dataset} has {told}",
                "Write the same classes in the same order, or leave it out.",
            )
        return self.model_copy(update={"classes": self.classes or list(classes or ())})

    def targets(self, labels: np.ndarray) -> np.ndarray:
        """Stored labels [n] as what is learnt: themselves, or the places of their classes (NaN where they are none)."""
        if not self.classifies:
            return labels
        if self.thresholds:
            return np.searchsorted(np.array(self.thresholds), labels, side="right").astype(np.float64)
        whole = (labels == np.floor(labels)) & (labels >= 0) & (labels < len(self.classes))
        return np.where(whole, labels, np.nan)

    def checked(self, labels: np.ndarray, keys: Sequence[str], where: str) -> np.ndarray:
        """`targets` of all clips of a split.

        Raises:
            UserErrors: clips whose label is no class.
        """
        found = self.targets(labels)
        wrong = np.flatnonzero(np.isnan(found))
        if not len(wrong):
            return found
        remedy = (
            f"Labels must be places of {', '.join(self.classes)}, from 0 to {len(self.classes) - 1}: make the shards "
            "with --classes, or bound numbers with task.thresholds."
        )
        errors = [
            UserError(f"{where}, clip {keys[int(i)]}", f"has the label {labels[i]:g}, which is no class", remedy)
            for i in wrong[:MOST_NAMED]
        ]
        if len(wrong) > MOST_NAMED:
            errors.append(UserError(where, f"has {len(wrong) - MOST_NAMED} more such clips", "Mend them too."))
        raise UserErrors(errors)


class Measure(NamedTuple):
    """How a kind of task is judged and shown.

    names: of the metrics, each with what it says, the main one first; main: of them, what a checkpoint is selected by;
    rises: whether more of it is better; unit: for axes; answer: what the floor always answers.
    """

    names: Mapping[str, tuple[str, str]]
    main: str
    rises: bool
    unit: str
    answer: str

    @property
    def title(self) -> str:
        """Name of the main metric."""
        return self.names[self.main][0]

    @property
    def axis(self) -> str:
        """The main metric with its unit."""
        return self.title + self.unit

    def loss(self, value: float) -> float:
        """The main metric as something of which less is better."""
        return -value if self.rises else value


MEASURES: dict[Kind, Measure] = {
    "regression": Measure(
        {
            "mae": ("MAE", "label units, lower is better"),
            "corr": ("Pearson r", "higher is better"),
            "acc7": ("Acc-7", "equal after clipping to ±3 and rounding"),
            "acc2_nonzero": ("Acc-2 (non-zero)", "positive against negative, zero labels left out"),
            "f1_nonzero": ("F1 (non-zero)", "weighted"),
            "acc2_has0": ("Acc-2 (has 0)", "non-negative against negative"),
            "f1_has0": ("F1 (has 0)", "weighted"),
        },
        "mae",
        rises=False,
        unit=" (label units)",
        answer="the median training label",
    ),
    "classification": Measure(
        {
            "macro_f1": ("Macro-F1", "mean over classes, higher is better"),
            "accuracy": ("Accuracy", "share of clips, higher is better"),
            "weighted_f1": ("Weighted F1", "by how frequent a class is"),
            "uar": ("UAR", "mean recall of the classes"),
        },
        "macro_f1",
        rises=True,
        unit="",
        answer="the commonest training class",
    ),
}


def confusion(prediction: ArrayLike, label: ArrayLike, classes: int) -> np.ndarray:
    """[C, C] clips by label (row) and prediction (column), of places of classes [n]."""
    places = np.asarray(label).astype(np.int64) * classes + np.asarray(prediction).astype(np.int64)
    return np.bincount(places, minlength=classes**2).reshape(classes, classes)


def task_of(recipe: Mapping[str, Any]) -> TaskSettings:
    """Of a recipe as plain values, which may hold anything; regression where it says nothing that can be read."""
    try:
        task = TaskSettings.model_validate(recipe.get("task", {}))
    except ValidationError:
        return TaskSettings()
    return TaskSettings() if any(task.conflicts()) else task
