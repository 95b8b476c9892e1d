"""Figures of representations_SPLIT.safetensors: where both flows place each clip, and what VGMR thinks of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dist_train.figures import FAINT, FLOW_NAMES, INK, WIDTH, Plot, distances, similarity
from dist_train.names import FLOWS, MODALITIES
from dist_train.robustness_figures import VALUE_NAMES
from dist_train.run_record import Run

MARKERS = {"complete": "o", "missing": "^"}


class Plane(NamedTuple):
    """Principal components of both flows of n clips together.

    points: flow -> [n, 2]; explained: [2], share of the variance along each axis; apart: mean distance of a clip's two
    flows; spread: root mean square distance of all 2n points from their centre. Both over all components.
    """

    points: dict[str, np.ndarray]
    explained: np.ndarray
    apart: float
    spread: float


def plane(complete: np.ndarray, missing: np.ndarray) -> Plane:
    """The plane in which the points of both flows [n, d] differ most. The sign of an axis has no meaning: each shows
    to where its largest coefficient is positive.
    """
    points = np.concatenate([complete, missing]).astype(np.float64)
    centred = points - points.mean(0)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:2]
    signs = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])
    shown = np.zeros((len(points), 2))
    shown[:, : len(axes)] = centred @ (axes * signs[:, None]).T
    variance = np.zeros(2)
    total = float((sizes**2).sum())
    if total > 0:
        variance[: len(axes)] = sizes[:2] ** 2 / total
    halves = dict(zip(FLOWS, np.split(shown, 2), strict=True))
    apart = float(np.linalg.norm(complete.astype(np.float64) - missing, axis=1).mean())
    return Plane(halves, variance, apart, math.sqrt(total / len(points)))


def representations(points: dict[str, np.ndarray], explained: np.ndarray, label: np.ndarray) -> Figure:
    """Both points of each clip in one plane, joined by a line; points [n, 2], label [n] is the colour."""
    figure = Figure(figsize=(WIDTH, 4.6))
    axes = figure.add_subplot()
    pairs = np.stack([points[flow] for flow in FLOWS], 1)  # [n, 2 flows, 2]
    gaps = np.concatenate([pairs, np.full_like(pairs[:, :1], np.nan)], 1).reshape(-1, 2)
    axes.plot(*gaps.T, color=INK, linewidth=0.5, alpha=0.4, zorder=1)
    low, high = float(label.min()), float(label.max())
    size = float(np.clip(3000 / len(label), 10, 40))
    for flow, place in points.items():
        drawn = axes.scatter(
            place[:, 0], place[:, 1], c=label, cmap="cividis", vmin=low, vmax=high, s=size, marker=MARKERS[flow],
            linewidths=0.4, edgecolors=INK, zorder=2,
        )  # fmt: skip
    first, second = (f"{100 * share:.0f} % of the variance" for share in explained)
    axes.set(xlabel=f"first component ({first})", ylabel=f"second component ({second})")
    axes.set_aspect("equal", adjustable="datalim")
    bar = figure.colorbar(drawn, ax=axes, location="bottom", shrink=0.6, aspect=34, pad=0.03)
    bar.set_label("label")
    bar.outline.set_visible(False)
    marks = [
        Line2D([], [], color=INK, marker=MARKERS[flow], markersize=5, markerfacecolor="none", linestyle="none",
               label=FLOW_NAMES[flow])
        for flow in points
    ]  # fmt: skip
    figure.legend(handles=marks, loc="outside upper left", ncols=2)
    return figure


def refinement(refined: Mapping[str, np.ndarray], label: np.ndarray) -> Figure:
    """VGMR's values and gate of each modality and clip, flow -> [n, 3, k + 1], clips ordered by label [n].

    One colour scale for both flows of a quantity, as wide as what it takes on.
    """
    order = np.argsort(label, kind="stable")
    label = label[order]
    names = VALUE_NAMES[next(iter(refined.values())).shape[2]]
    figure = Figure(figsize=(WIDTH, 0.7 + 1.15 * len(names)))
    panels = figure.subplots(len(names), len(refined), sharex=True, sharey=True, squeeze=False)
    places = np.unique(np.linspace(0, len(label) - 1, 6).round().astype(int)[1:-1])
    ticks = [f"{label[place] + 0.0:.2g}".replace("-", "−") for place in places]
    for number, (row, name) in enumerate(zip(panels, names, strict=True)):
        tables = {flow: values[order, :, number].T.astype(np.float64) for flow, values in refined.items()}
        low, high = (float(end(list(tables.values()))) for end in (np.min, np.max))
        for axes, (flow, table) in zip(row, tables.items(), strict=True):
            image = axes.imshow(table, cmap="cividis", vmin=low, vmax=high, aspect="auto", interpolation="nearest")
            axes.set_title(f"{name}, {FLOW_NAMES[flow]}")
            axes.set_yticks(range(len(MODALITIES)), MODALITIES)
            axes.set_xticks(places, ticks)
            axes.grid(visible=False)
            axes.spines[:].set_color(FAINT)
        bar = figure.colorbar(image, ax=list(row), aspect=9, pad=0.02)
        bar.outline.set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel("label of the clip")
    return figure


def plots(run: Run) -> Iterator[Plot]:
    """The figures of the page, each bound to its data."""
    titles = ("Do the flows agree? Representations by label", "Representations")
    found = run.representations
    if found is None:
        for name, title in zip(("similarity", "representations"), titles, strict=True):
            yield Plot(name, title, "No representations were written.", None)
        return
    about = f"of {len(found.label)} clips of the {found.split} split"
    matrix = distances(found.complete, found.missing)
    own, other = np.diag(matrix).mean(), matrix[~np.eye(len(matrix), dtype=bool)].mean() if len(matrix) > 1 else None
    caption = (
        f"L2 distance between final representations {about}, ordered by label. The "
        "closer the right matrix is to the left one, the better the missing flow stands in for the complete one. "
        f"Mean distance of a clip's two flows: {own:.3g}"
        + ("." if other is None else f"; of different clips: {other:.3g}.")
    )
    draw = partial(similarity, found.complete, found.missing, found.label)
    yield Plot("similarity", titles[0], caption, draw)
    flat = plane(found.complete, found.missing)
    ratio = f", {flat.apart / flat.spread:.2f} of the spread of all points" if flat.spread > 0 else ""
    caption = (
        f"Principal components of the final representations {about}, one plane for both flows: it holds "
        f"{flat.explained.sum():.0%} of their variance. A line joins the two points of a clip. In all dimensions they "
        f"are {flat.apart:.3g} apart in the mean{ratio} (root mean square distance from the centre, {flat.spread:.3g})."
    )
    draw = partial(representations, flat.points, flat.explained, found.label)
    yield Plot("representations", titles[1], caption, draw)
    if found.refined:
        yield Plot(
            "refinement",
            "What the refinement thinks of each clip",
            f"Values in (0, 1) and gate, 1 where it is neutral, {about}, by label. Each scale spans what occurs.",
            partial(refinement, found.refined, found.label),
        )
