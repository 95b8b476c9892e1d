"""Figures of a classifier: what is taken for what, and how much of each class is found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from dist_train.figures import FLOW_COLOURS, FLOW_NAMES, INK, WIDTH
from dist_train.task import confusion

MOST_WRITTEN = 10  # classes whose numbers fit into a matrix
MOST_NAMED = 40  # classes whose names fit beside it
LONGEST = 14  # characters of a name


def confusions(label: np.ndarray, predicted: Mapping[str, np.ndarray], classes: Sequence[str]) -> Figure:
    """Confusion matrix of each flow: clips of a class (row) that are taken for each class (column), coloured by their
    share; [n] places of classes.
    """
    count = len(classes)
    figure = Figure(figsize=(WIDTH, 3.7))
    panels = np.atleast_1d(figure.subplots(1, len(predicted), sharey=True))
    shown = range(count) if count <= MOST_NAMED else []
    for axes, (flow, places) in zip(panels, predicted.items(), strict=True):
        counts = np.array(confusion(places, label, count))
        share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        image = axes.imshow(share, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
        for (row, column), clips in np.ndenumerate(counts) if count <= MOST_WRITTEN else ():
            axes.text(
                column, row, f"{clips}", ha="center", va="center", fontsize=7,
                color="white" if share[row, column] < 0.5 else "black",
            )  # fmt: skip
        axes.set_title(FLOW_NAMES[flow], color=FLOW_COLOURS[flow])
        axes.set_xticks(shown, [classes[place][:LONGEST] for place in shown], rotation=40, ha="right")
        axes.set_yticks(shown, [classes[place][:LONGEST] for place in shown])
        axes.set_xlabel("prediction")
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    panels[0].set_ylabel("label")
    bar = figure.colorbar(image, ax=list(panels), location="bottom", shrink=0.6, aspect=34, pad=0.03)
    bar.set_label("share of the clips with the label")
    bar.outline.set_visible(False)
    return figure


def recall(label: np.ndarray, predicted: Mapping[str, np.ndarray], classes: Sequence[str]) -> Figure:
    """Recall of each class in both flows with its 95 % interval (Wilson, 1927); [n] places of classes."""
    figure = Figure(figsize=(WIDTH, 1.1 + 0.42 * len(classes)) if len(classes) > MOST_WRITTEN else (WIDTH, 3.3))
    axes = figure.add_subplot()
    clips = np.bincount(label.astype(int), minlength=len(classes))
    there = [place for place, count in enumerate(clips) if count]
    width = 0.8 / len(predicted)
    lying = len(classes) > MOST_WRITTEN  # names of many classes stand beside lying bars
    for k, (flow, places) in enumerate(predicted.items()):
        found = np.bincount(label[places == label].astype(int), minlength=len(classes))[there] / clips[there]
        low, high = wilson(found, clips[there])
        x = np.arange(len(there)) + (k - (len(predicted) - 1) / 2) * width
        spread = np.stack([found - low, high - found]).clip(min=0)
        draw, error = (axes.barh, "xerr") if lying else (axes.bar, "yerr")
        style = {"ecolor": INK, "elinewidth": 0.9, "capsize": 1.5}
        draw(x, found, 0.92 * width, color=FLOW_COLOURS[flow], label=FLOW_NAMES[flow],
             **{error: spread, "error_kw": style})  # type: ignore[arg-type]  # fmt: skip
    names = [f"{classes[place][:LONGEST]}\nn={clips[place]}" for place in there]
    if lying:
        axes.set_yticks(np.arange(len(there)), [name.replace("\n", ", ") for name in names])
        axes.set(xlabel="recall", xlim=(0, 1))
        axes.invert_yaxis()
    else:
        axes.set_xticks(np.arange(len(there)), names)
        axes.set(ylabel="recall", ylim=(0, 1))
    axes.grid(visible=False, axis="y" if lying else "x")
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def wilson(share: np.ndarray, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of a share of so many clips; arrays [n]."""
    z = 1.959964
    middle = (share + z**2 / (2 * clips)) / (1 + z**2 / clips)
    half = z / (1 + z**2 / clips) * np.sqrt(share * (1 - share) / clips + z**2 / (4 * clips**2))
    return middle - half, middle + half
