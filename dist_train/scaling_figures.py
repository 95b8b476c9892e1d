"""Figures of scaling: what runs measured, beside what was foretold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from dist_train.figures import FAINT, WIDTH
from dist_train.scaling import Figure as Measured
from dist_train.scaling import Point, Scaling, Series

MODEL = "#009e73"  # what is foretold, in every figure
KINDS = {"weak": "#0072b2", "strong": "#d55e00"}
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:g} %")
WAITING = "#b9c0c9"


def measured(scaling: Scaling, series: Series) -> Figure:
    """A series: clips per second, efficiency, time in collectives and bytes, each over its points, with 95 %
    intervals, beside what was foretold.
    """
    points = [scaling.points[entry.point] for entry in series.entries]
    places = np.arange(len(points))
    colour = KINDS[series.kind]
    figure = Figure(figsize=(WIDTH, 5.2))
    panels = figure.subplots(2, 2).ravel()
    ranks = np.array([point.ranks for point in points])

    panels[0].set_title("Clips per second")
    first = points[0].clips_per_second.value
    panels[0].plot(places, first * ranks / ranks[0], color=FAINT, linewidth=3, zorder=0, label="in proportion to ranks")
    dots(panels[0], places, [point.clips_per_second for point in points], colour)
    model(panels[0], places, [point.foretold.clips_per_second if point.foretold else np.nan for point in points])
    panels[0].set_ylim(bottom=0)

    panels[1].set_title("Efficiency: clips/s per rank")
    panels[1].axhline(1, color=FAINT, linewidth=3, zorder=0)
    dots(panels[1], places, [entry.efficiency for entry in series.entries], colour)
    model(panels[1], places, [gap(entry.foretold_efficiency) for entry in series.entries])
    panels[1].yaxis.set_major_formatter(PERCENT)
    panels[1].set_ylim(bottom=0)

    shares(panels[2], places, points, colour)
    wires(panels[3], places, points, colour)
    names = [f"{point.ranks}" + (f"\n{point.nodes} nodes" if (point.nodes or 1) > 1 else "") for point in points]
    for axes in panels:
        axes.set_xticks(places, names)
        axes.set_xlim(-0.5, len(points) - 0.5)
        axes.grid(visible=False, axis="x")
    for axes in panels[2:]:
        axes.set_xlabel("ranks")
    figure.legend(*gathered(panels), loc="outside upper left", ncols=3, columnspacing=1.2)
    return figure


def dots(axes: Axes, places: np.ndarray, values: Sequence[Measured], colour: str) -> None:
    """Measured values with their intervals."""
    middle = np.array([value.value for value in values])
    reach = [
        [0.0 if value.low is None else value.value - value.low for value in values],
        [0.0 if value.high is None else value.high - value.value for value in values],
    ]
    axes.errorbar(places, middle, reach, color=colour, marker="o", markersize=4.5, capsize=3, label="measured, 95 %")


def model(axes: Axes, places: np.ndarray, values: Sequence[float]) -> None:
    """What was foretold."""
    if np.isfinite(values).any():
        axes.plot(places, values, color=MODEL, marker="D", markersize=4, linestyle="--", label="foretold")


def shares(axes: Axes, places: np.ndarray, points: Sequence[Point], colour: str) -> None:
    """Share of the step in collectives: transfer, and waiting for others on top where it is known."""
    axes.set_title("Share of the step in collectives")
    whole = np.array([point.exchange_share.value if point.exchange_share else np.nan for point in points])
    waited = whole * np.array([gap(point.waiting_share) for point in points])
    moved = whole - np.nan_to_num(waited)
    axes.bar(places, moved, 0.55, color=colour)
    if np.nan_to_num(waited).any():
        axes.bar(places, waited, 0.55, bottom=moved, color=WAITING, label="waiting for later ranks")
    foretold = [point.foretold.exchange_share if point.foretold else np.nan for point in points]
    if np.isfinite(foretold).any():
        axes.plot(places, foretold, color=MODEL, marker="D", markersize=4, linestyle="none")
    axes.yaxis.set_major_formatter(PERCENT)
    axes.set_ylim(bottom=0)


def wires(axes: Axes, places: np.ndarray, points: Sequence[Point], colour: str) -> None:
    """Bytes that a rank sends in a step."""
    axes.set_title("Sent by a rank in a step (MB)")
    sent = np.array([point.wire.sent if point.wire else np.nan for point in points])
    foretold = np.array([point.wire.foretold_sent if point.wire else np.nan for point in points])
    axes.bar(places, sent / 1e6, 0.55, color=colour)
    axes.plot(places, foretold / 1e6, color=MODEL, marker="D", markersize=4, linestyle="none")
    axes.set_ylim(bottom=0)


def gap(value: float | None) -> float:
    """NaN, which is not drawn, for what is not known."""
    return np.nan if value is None else value


def gathered(panels: Sequence[Axes]) -> tuple[list[Any], list[str]]:
    """Every label of the panels once."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)
