"""Figures of representations_SPLIT.safetensors: where both flows place each clip, and what VGMR thinks of it."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dist_train.figures import (
    FAINT,
    FLOW_COLOURS,
    FLOW_NAMES,
    INK,
    NEUTRAL,
    WIDTH,
    Plot,
    distances,
    label_ticks,
    similarity,
)
from dist_train.label_order import by_label
from dist_train.names import MODALITIES
from dist_train.robustness_figures import VALUE_NAMES
from dist_train.run_record import Representations, Run, are_places

# Marker and edge of each set of points; what is imagined has the missing flow's colour, like all of that flow.
MARKS = {
    "complete": ("o", FLOW_COLOURS["complete"]),
    "missing": ("^", FLOW_COLOURS["missing"]),
    "real": ("o", FLOW_COLOURS["complete"]),
    "incoming": ("x", NEUTRAL),
    "imagined": ("^", FLOW_COLOURS["missing"]),
}
NAMES = {**FLOW_NAMES, "incoming": "as it comes in"}
PERPLEXITY, SEED = 30, 0
FEWEST = 12  # points, below which t-SNE has no neighbourhoods to keep
NO_TSNE = "No t-SNE: scikit-learn is not installed (pip install 'dist-train[figures]')."


class Plane(NamedTuple):
    """Principal components of several points of each of n clips together.

    points: set -> [n, 2]; explained: [2], share of the variance along each axis; apart: mean distance of a clip's first
    point to its last; spread: root mean square distance of all points from their centre. Both over all components.
    """

    points: dict[str, np.ndarray]
    explained: np.ndarray
    apart: float
    spread: float


def plane(sets: Mapping[str, np.ndarray]) -> Plane:
    """The plane in which the points of all sets [n, d] differ most. The sign of an axis has no meaning: each shows
    to where its largest coefficient is positive.
    """
    points = np.concatenate(list(sets.values())).astype(np.float64)
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
    parts = dict(zip(sets, np.split(shown, len(sets)), strict=True))
    first, *_, last = (points.astype(np.float64) for points in sets.values())
    return Plane(parts, variance, float(np.linalg.norm(first - last, axis=1).mean()), math.sqrt(total / len(points)))


def perplexity(points: int) -> float:
    """Of t-SNE over so many points: 30, or a third of their number."""
    return min(PERPLEXITY, (points - 1) / 3)


def neighbours(sets: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """t-SNE of the points of all sets [n, d] together, from their principal components on: set -> [n, 2]. None without
    scikit-learn, and where the points are too few or all alike.
    """
    points = np.concatenate(list(sets.values())).astype(np.float64)
    spread = points.std(0).max()
    if not has_tsne() or len(points) < FEWEST or points.shape[1] < 2 or spread <= 0:
        return None
    from sklearn.manifold import TSNE  # noqa: PLC0415  an extra, and slow to import

    scaled = (points - points.mean(0)) / spread  # of any size: it computes in fp32
    found = TSNE(perplexity=perplexity(len(points)), init="pca", random_state=SEED).fit_transform(scaled)
    return dict(zip(sets, np.split(found, len(sets)), strict=True))


def has_tsne() -> bool:
    """Whether scikit-learn is installed."""
    return importlib.util.find_spec("sklearn") is not None


def representations(
    flat: Plane, near: Mapping[str, np.ndarray] | None, label: np.ndarray, classes: Sequence[str] = ()
) -> Figure:
    """All points of each clip, joined by a line, in their plane and beside it by t-SNE; label [n] is the colour: a
    number, or the place of one of `classes`.

    Args:
        near: set -> [n, 2], see `neighbours`; None: the plane alone.
    """
    views = [("principal components", flat.points)] + ([] if near is None else [("t-SNE", near)])
    figure = Figure(figsize=(WIDTH, 4.1 if near else 4.6))
    panels = list(figure.subplots(1, len(views), squeeze=False)[0])
    low, high = (-0.5, len(classes) - 0.5) if classes else (float(label.min()), float(label.max()))
    few = len(classes) <= len(mpl.colormaps["tab10"].colors)  # type: ignore[attr-defined]
    colours = mpl.colormaps["tab10" if few else "turbo"](np.linspace(0, 1, 10 if few else len(classes)))
    cmap = ListedColormap(colours[: len(classes)]) if classes else mpl.colormaps["cividis"]
    size = float(np.clip((1500 if near else 3000) / len(label), 8, 40))
    for axes, (title, points) in zip(panels, views, strict=True):
        ways = np.stack(list(points.values()), 1)  # [n, sets, 2]
        gaps = np.concatenate([ways, np.full_like(ways[:, :1], np.nan)], 1).reshape(-1, 2)
        axes.plot(*gaps.T, color=INK, linewidth=0.5, alpha=0.4, zorder=1)
        for name, place in points.items():
            marker, edge = MARKS[name]
            filled = marker != "x"
            drawn = axes.scatter(
                place[:, 0], place[:, 1], c=label, cmap=cmap, vmin=low, vmax=high, s=size, marker=marker,
                linewidths=0.7 if filled else 1.0, edgecolors=edge if filled else None, zorder=2,
            )  # fmt: skip
        axes.set_title(title)
        square(axes, np.concatenate(list(points.values())))
    first, second = (f"{100 * share:.0f} %" for share in flat.explained)
    panels[0].set(xlabel=f"first ({first} of the variance)", ylabel=f"second ({second})")
    for axes in panels[1:]:
        axes.set_xticks([])
        axes.set_yticks([])
    bar = figure.colorbar(drawn, ax=panels, location="bottom", shrink=0.6, aspect=34, pad=0.03)
    bar.set_label("label")
    if classes and few:
        bar.set_ticks(list(range(len(classes))), labels=[name[:12] for name in classes])
    bar.outline.set_visible(False)
    marks = [
        Line2D([], [], color=MARKS[name][1], marker=MARKS[name][0], markersize=5, markerfacecolor="none",
               linestyle="none", label=NAMES.get(name, name))
        for name in flat.points
    ]  # fmt: skip
    figure.legend(handles=marks, loc="outside upper left", ncols=3)
    return figure


def square(axes: Axes, points: np.ndarray) -> None:
    """Equal scales around points [n, 2], known before the layout is solved: labels then keep their place."""
    low, high = points.min(0), points.max(0)
    half = 0.54 * float((high - low).max()) or 0.5
    (left, bottom), (right, top) = (low + high) / 2 - half, (low + high) / 2 + half
    axes.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")


def projected(
    name: str, title: str, sets: Mapping[str, np.ndarray], label: np.ndarray, about: str, classes: Sequence[str]
) -> Plot:
    """The plot of some sets of points [n, d] of the same clips, by `representations`."""
    flat, near = plane(sets), neighbours(sets)
    caption = f"{about} The plane holds {flat.explained.sum():.0%} of their variance."
    if near is not None:
        points = len(sets) * len(label)
        caption += f" t-SNE: perplexity {perplexity(points):g}, seed {SEED}; it keeps neighbourhoods, not distances."
    elif not has_tsne():
        caption += f" {NO_TSNE}"
    return Plot(name, title, caption, partial(representations, flat, near, label, classes))


def refinement(refined: Mapping[str, np.ndarray], label: np.ndarray, classes: Sequence[str] = ()) -> Figure:
    """VGMR's values and gate of each modality and clip, flow -> [n, 3, k + 1], clips ordered by label [n].

    One colour scale for both flows of a quantity, as wide as what it takes on.
    """
    order = np.argsort(label, kind="stable")
    label = label[order]
    names = VALUE_NAMES[next(iter(refined.values())).shape[2]]
    figure = Figure(figsize=(WIDTH, 0.7 + 1.15 * len(names)))
    panels = figure.subplots(len(names), len(refined), sharex=True, sharey=True, squeeze=False)
    places, ticks = label_ticks(np.sort(label), classes)
    for number, (row, name) in enumerate(zip(panels, names, strict=True)):
        tables = {flow: values[order, :, number].T.astype(np.float64) for flow, values in refined.items()}
        low, high = (float(end(list(tables.values()))) for end in (np.min, np.max))
        for axes, (flow, table) in zip(row, tables.items(), strict=True):
            image = axes.imshow(table, cmap="cividis", vmin=low, vmax=high, aspect="auto", interpolation="nearest")
            axes.set_title(f"{name}, {FLOW_NAMES[flow]}")
            axes.set_yticks(range(len(MODALITIES)), MODALITIES)
            axes.set_xticks(places, ticks, rotation=30 if classes else 0)
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
    classes = run.task.classes if are_places(found.label.tolist(), run.task.classes) else []
    matrix = distances(found.complete, found.missing)
    own, other = np.diag(matrix).mean(), matrix[~np.eye(len(matrix), dtype=bool)].mean() if len(matrix) > 1 else None
    about_labels = (
        "Rank-biserial correlation of distance and whether labels differ"
        if classes
        else "Spearman correlation of distance and label difference"
    )
    order = by_label(found.complete, found.missing, found.label, nominal=bool(classes))
    caption = (
        f"L2 distance between final representations {about}, ordered by label. The "
        "closer the right matrix is to the left one, the better the missing flow stands in for the complete one. "
        + (
            ""
            if order is None
            else f"{about_labels}: complete × complete {order.complete:.2f}, complete × missing {order.between:.2f}. "
        )
        + f"Mean distance of a clip's two flows: {own:.3g}"
        + ("." if other is None else f"; of different clips: {other:.3g}.")
    )
    draw = partial(similarity, found.complete, found.missing, found.label, classes)
    yield Plot("similarity", titles[0], caption, draw)
    flows = {"complete": found.complete, "missing": found.missing}
    flat = plane(flows)
    ratio = f", {flat.apart / flat.spread:.2f} of the spread of all points" if flat.spread > 0 else ""
    caption = (
        f"Final representations {about}, both flows together. A line joins the two points of a clip: in all dimensions "
        f"they are {flat.apart:.3g} apart in the mean{ratio} (root mean square distance from the centre, "
        f"{flat.spread:.3g})."
    )
    yield projected("representations", titles[1], flows, found.label, caption, classes)
    yield from imagined(found, classes)
    if found.refined:
        yield Plot(
            "refinement",
            "What the refinement thinks of each clip",
            f"Values in (0, 1) and gate, 1 where it is neutral, {about}, by label. Each scale spans what occurs.",
            partial(refinement, found.refined, found.label, classes),
        )


def imagined(found: Representations, classes: Sequence[str]) -> Iterator[Plot]:
    """What is imagined beside what it imagines; nothing of runs that imagine nothing, or only what no clip has."""
    if found.stand_in is None or found.lacks is None:
        return
    known = found.lacks >= 0
    real, incoming, made = (points[known] for points in found.stand_in.swapaxes(0, 1))
    lacks = found.lacks[known]
    if len(made) < 2 or not differs(made, lacks):  # the same for all clips: a zero step stands in
        return
    sets = {"real": real, "imagined": made}
    changed = differs(incoming, lacks) and not np.allclose(incoming, made)
    if changed:
        sets = {"real": real, "incoming": incoming, "imagined": made}
    matrix = distances(real, made)
    own, other = np.diag(matrix).mean(), matrix[~np.eye(len(matrix), dtype=bool)].mean()
    names = " or ".join(name for number, name in enumerate(MODALITIES) if (lacks == number).any())
    caption = (
        f"Pooled vectors of {names} of {known.sum()} clips of the {found.split} split that have it: real, "
        + (
            "as it comes into the missing flow, and as MIA-1 makes it of that"
            if changed
            else "and what stands in for it"
        )
        + f". Mean distance of what is imagined to its own clip's real vector {own:.3g}, to other clips' {other:.3g}"
        + (f"; as it comes in, to its own {np.linalg.norm(incoming - real, axis=1).mean():.3g}. " if changed else ".")
        + ("No loss compares these very vectors: MKD-1 and MKD-2 do so one layer further on." if changed else "")
    )
    yield projected("imagined", "What is imagined, and what it imagines", sets, found.label[known], caption, classes)


def differs(vectors: np.ndarray, lacks: np.ndarray) -> bool:
    """Whether vectors [n, d] of one modality differ between clips; lacks [n]: which modality it is."""
    groups = [vectors[lacks == number] for number in np.unique(lacks)]
    return any(bool(group.std(0).max() > 1e-4 * np.abs(group).max()) for group in groups)  # more than rounding
