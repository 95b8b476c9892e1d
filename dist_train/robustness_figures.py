"""Figures of robustness_SPLIT.json: what is left of a model when modalities are missing or noisy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dist_train.figures import FAINT, FLOW_COLOURS, FLOW_NAMES, INK, NEUTRAL, WIDTH
from dist_train.robustness_record import NoisePoint, RatePoint, Scores
from dist_train.task import Measure

COLOURS = {"audio": "#0072b2", "text": "#d55e00", "vision": "#009e73", "random": "#4b5563"}  # Okabe & Ito (2008)
NAMES = {"random": "one of the three"}
VALUE_NAMES = {1: ["gate"], 2: ["value", "gate"], 3: ["g", "mean p", "gate"]}  # by how many a refinement tells


def missing_rates(curves: Mapping[Any, Sequence[RatePoint]], floor: float, measure: Measure) -> Figure:
    """The main metric over the share of clips that lack a modality, a line each; shaded: ± deviation of draws."""
    figure = Figure(figsize=(WIDTH, 3.6))
    axes = figure.add_subplot()
    for modality, curve in curves.items():
        points = [(p.rate, p.value(measure.main), p.value(f"{measure.main}_std")) for p in curve]
        rate, mean, deviation = np.array(points).T
        colour = COLOURS[modality]
        axes.plot(100 * rate, mean, color=colour, marker="o", markersize=3, label=NAMES.get(modality, modality))
        axes.fill_between(100 * rate, mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(floor, color=INK, linestyle="--", linewidth=1.1, label=f"floor: constant {floor:.3f}")
    axes.set(xlabel="clips that lack it (%)", ylabel=measure.axis)
    figure.legend(loc="outside upper left", ncols=3, columnspacing=1.4)
    return figure


def patterns(found: Mapping[str, Scores], floor: float, measure: Measure) -> Figure:
    """The main metric under each of the seven patterns of what is there."""
    figure = Figure(figsize=(WIDTH, 0.9 + 0.34 * len(found)))
    axes = figure.add_subplot()
    reached = [scores.value(measure.main) for scores in found.values()]
    bars = axes.barh(list(found), reached, color=NEUTRAL, height=0.6)
    axes.bar_label(bars, [f"{value:.3f}" for value in reached], padding=4)
    axes.axvline(floor, color=INK, linestyle="--", linewidth=1.1)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"{measure.axis}; dashed: floor {floor:.3f}")
    return figure


def noise(
    found: Mapping[Any, Mapping[Any, Sequence[NoisePoint]]], clean: dict[str, float], floor: float, measure: Measure
) -> Figure:
    """The main metric of both flows over how much noise there is: a row per modality, replaced steps beside added."""
    figure = Figure(figsize=(WIDTH, 1.75 * len(found) + 0.5))
    panels = figure.subplots(len(found), 2, sharey=True, squeeze=False)
    titles = {"ratio": "steps replaced (%)", "weight": "added (× signal)"}
    for row, (modality, kinds) in zip(panels, found.items(), strict=True):
        for axes, (kind, points) in zip(row, kinds.items(), strict=True):
            scale = 100 if kind == "ratio" else 1
            x = scale * np.array([0.0, *(point.size for point in points)])
            for flow, colour in FLOW_COLOURS.items():
                y = [clean[flow], *(getattr(point, flow).value(measure.main) for point in points)]
                axes.plot(x, y, color=colour, marker="o", markersize=3, label=FLOW_NAMES[flow])
            axes.axhline(floor, color=INK, linestyle="--", linewidth=1.0)
            axes.set_title(f"noise in {modality}: {titles[kind]}")
        row[0].set_ylabel(measure.title)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return figure


def values(found: Mapping[str, Sequence[Sequence[float]]], modalities: Sequence[str]) -> Figure:
    """VGMR's values and gate of each modality, clean beside noise: mean over clips."""
    figure = Figure(figsize=(WIDTH, 0.5 + 0.3 * len(found)))
    width = len(next(iter(found.values()))[0])
    panels = figure.subplots(1, width, sharey=True, squeeze=False)[0]
    for number, (axes, name) in enumerate(zip(panels, VALUE_NAMES[width], strict=True)):
        table = np.array([[condition[m][number] for m in range(len(modalities))] for condition in found.values()])
        axes.imshow(table, cmap="cividis", aspect="auto", interpolation="nearest")
        middle = (table.min() + table.max()) / 2
        for (row, column), value in np.ndenumerate(table):
            axes.text(
                column, row, f"{value:.2f}", ha="center", va="center", fontsize=7,
                color="white" if value < middle else "black",
            )  # fmt: skip
        axes.set_title(name)
        axes.set_xticks(range(len(modalities)), modalities)
        axes.grid(visible=False)
        axes.spines[:].set_color(FAINT)
    panels[0].set_yticks(range(len(found)), list(found))
    return figure
