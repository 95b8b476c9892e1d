"""The figures of a run's report. Each function takes arrays and returns one matplotlib figure.

Figures are small (`WIDTH` inches) so that their text stays readable on a phone, and never touch pyplot: no global
state, no display. The two flows keep the same colour in every figure; colours are from Okabe & Ito (2008) and remain
distinct under colour-blindness.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dist_train.names import FLOWS

FLOW_NAMES = {"complete": "complete flow", "missing": "missing flow"}
WIDTH = 5.8  # inches
SIZES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
LOSS_NAMES = {
    "loss": "Total loss, weighted",
    "loss/mse_complete": "MSE, complete flow",
    "loss/mse_missing": "MSE, missing flow",
    "loss/ce_complete": "Cross-entropy, complete flow",
    "loss/ce_missing": "Cross-entropy, missing flow",
    "loss/mkd1": "MKD-1: RMSE of text vectors",
    "loss/mkd2": "MKD-2: RMSE of text views",
    "loss/rs": "RS: RMSE of representations",
    "loss/rnc": "RNC: rank-n-contrast",
}


INK, FAINT, NEUTRAL = "#1f2933", "#d5dae0", "#4b5563"  # text, grid, and lines where no flow is meant
FLOW_COLOURS = {"complete": "#0072b2", "missing": "#d55e00"}

Draw = Callable[[], Figure]


class Plot(NamedTuple):
    """A figure of the page. `draw` is None when the run has no data for it; then `caption` says so."""

    name: str
    title: str
    caption: str
    draw: Draw | None


def render(draw: Draw) -> bytes:
    """Draw one figure on white; return it as PNG."""
    style: Any = {
        "figure.constrained_layout.use": True,
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
        "axes.labelsize": 8.5,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.fontsize": 8,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.6,
        "figure.dpi": 150,
        "figure.facecolor": "white",
        "axes.facecolor": "white",
        "grid.color": FAINT,
        "axes.edgecolor": FAINT,
        "xtick.color": INK,
        "ytick.color": INK,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
    }
    png = io.BytesIO()
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a layout too tight to solve still draws
        FigureCanvasAgg(draw()).print_png(png)  # savefig would draw twice
    return png.getvalue()


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over about a twentieth of the points, ignoring NaN; [n] -> [n]."""
    width = 2 * (len(values) // 40) + 1
    known = np.isfinite(values)
    ones = np.ones(width)
    total = np.convolve(np.where(known, values, 0.0), ones, mode="full")
    count = np.convolve(known.astype(float), ones, mode="full")
    start = width // 2
    middle = slice(start, start + len(values))
    return np.where(count[middle] > 0, total[middle] / np.maximum(count[middle], 1), np.nan)


def _marker(x: np.ndarray) -> str | None:
    """A line of one or two points would be invisible."""
    return "o" if len(x) < 3 else None


def _curve(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str) -> None:
    """The raw values thin and pale, their moving average on top; log scale where they span more than a factor 30."""
    axes.plot(x, y, color=colour, alpha=0.3, linewidth=0.8)
    axes.plot(x, smooth(y), color=colour, marker=_marker(x))
    known = y[np.isfinite(y)]
    if len(known) and known.min() > 0 and known.max() > 30 * known.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")  # typesetting powers of ten, and minor ticks, would double the drawing
        axes.minorticks_off()
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))


def losses(step: np.ndarray, terms: dict[str, np.ndarray]) -> Figure:
    """Every loss term over optimizer steps, the total on top. `terms`: name in metrics.jsonl -> [n]."""
    names = [name for name in terms if name != "loss"]
    rows = (len(names) + 1) // 2
    figure = Figure(figsize=(WIDTH, 1.55 * (rows + 1) + 0.3))
    grid = figure.add_gridspec(rows + 1, 2)
    shared = figure.add_subplot(grid[0, :])
    panels = [("loss", shared)] if "loss" in terms else []
    panels += [(name, figure.add_subplot(grid[1 + k // 2, k % 2], sharex=shared)) for k, name in enumerate(names)]
    for name, axes in panels:
        flow = next((flow for flow in FLOWS if name.endswith(f"_{flow}")), None)
        _curve(axes, step, terms[name], FLOW_COLOURS[flow] if flow else NEUTRAL)
        axes.set_title(LOSS_NAMES.get(name, name.removeprefix("loss/")))
        if rows == 0 or name in names[-2:]:
            axes.set_xlabel("optimizer step")
    if "loss" not in terms:
        shared.set_visible(False)
    return figure


def schedule(step: np.ndarray, rate: np.ndarray, norm: np.ndarray) -> Figure:
    """Learning rate and gradient norm (before clipping) over optimizer steps; arrays [n]."""
    figure = Figure(figsize=(WIDTH, 4.0))
    upper, lower = figure.subplots(2, sharex=True)
    top = float(np.nanmax(rate)) if np.isfinite(rate).any() else 0.0
    power = int(np.floor(np.log10(top))) if top > 0 else 0
    upper.plot(step, rate / 10.0**power, color=NEUTRAL, marker=_marker(step))
    upper.set_title(f"Learning rate (×10{str(power).translate(SUPERSCRIPT)})" if power else "Learning rate")
    upper.set_ylim(bottom=0)
    _curve(lower, step, norm, NEUTRAL)
    lower.set_title("Gradient norm")
    lower.set_xlabel("optimizer step")
    return figure


def validation(
    step: np.ndarray,
    reached: dict[str, np.ndarray],
    *,
    floor: float | None,
    best_step: int | None,
    published: dict[str, float],
    axis: str,
) -> Figure:
    """The main metric of both flows over steps against the floor.

    Args:
        reached: flow -> [n].
        axis: name of the metric.
        published: flow -> MAE of a paper on the same corpus, drawn as thin lines; empty for any other corpus.
    """
    figure = Figure(figsize=(WIDTH, 3.6))
    axes = figure.add_subplot()
    for flow, values in reached.items():
        axes.plot(step, values, color=FLOW_COLOURS[flow], marker="o", markersize=3.5, label=FLOW_NAMES[flow])
    for flow, value in published.items():
        axes.axhline(
            value, color=FLOW_COLOURS[flow], linestyle=":", linewidth=1.3, label=f"MOSEI, published: {value:.3f}"
        )
    if floor is not None:
        axes.axhline(floor, color=INK, linestyle="--", linewidth=1.1, label=f"floor: constant {floor:.3f}")
    if best_step is not None:
        axes.axvline(best_step, color=FAINT, linewidth=4, zorder=0, label=f"selected: step {best_step}")
    axes.set(xlabel="optimizer step", ylabel=axis)
    axes.margins(y=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    figure.legend(loc="outside upper left", ncols=2, columnspacing=1.4)
    return figure


def scatter(label: np.ndarray, predicted: dict[str, np.ndarray]) -> Figure:
    """Prediction against label, one panel per flow with the same axes; arrays [n] in label units."""
    figure = Figure(figsize=(WIDTH, 3.3))
    panels = np.atleast_1d(figure.subplots(1, len(predicted), sharex=True, sharey=True))
    everything = np.concatenate([label, *predicted.values()])
    low, high = float(everything.min()), float(everything.max())
    pad = 0.04 * (high - low) or 0.5
    # Labels are heavily tied: a fixed small jitter shows how many points lie on one tick.
    ticks = np.unique(label)
    gap = float(np.diff(ticks).min()) if len(ticks) > 1 else 0.0
    tied = gap > 0.05 * (high - low)
    shift = np.random.default_rng(0).uniform(-0.25, 0.25, len(label)) * gap if tied else 0.0
    for axes, (flow, values) in zip(panels, predicted.items(), strict=True):
        axes.plot([low - pad, high + pad], [low - pad, high + pad], color=INK, linewidth=0.9, linestyle="--")
        axes.scatter(
            label + shift,
            values,
            s=float(np.clip(3000 / max(len(label), 1), 4, 22)),
            color=FLOW_COLOURS[flow],
            alpha=float(np.clip(150 / max(len(label), 1), 0.15, 0.7)),
            linewidths=0,
        )
        axes.set_title(FLOW_NAMES[flow], color=FLOW_COLOURS[flow])
        axes.set(xlabel="label", xlim=(low - pad, high + pad), ylim=(low - pad, high + pad))
        axes.set_aspect("equal")
    panels[0].set_ylabel("prediction")
    return figure


def bin_edges(label: np.ndarray) -> np.ndarray:
    """Edges of label bins: one per integer (the Acc-7 classes) when labels lie in [-3, 3], else seven equal ones."""
    low, high = float(label.min()), float(label.max())
    if low >= -3 and high <= 3 and high - low > 1:
        return np.arange(np.floor(low + 0.5), np.ceil(high - 0.5) + 2) - 0.5
    return np.linspace(low, high, 8) if high > low else np.array([low - 0.5, high + 0.5])


def error_by_label(label: np.ndarray, predicted: dict[str, np.ndarray]) -> Figure:
    """Mean absolute error in each label bin with its 95 % interval (1.96 standard errors), both flows."""
    figure = Figure(figsize=(WIDTH, 3.3))
    axes = figure.add_subplot()
    edges = bin_edges(label)
    where = np.clip(np.digitize(label, edges) - 1, 0, len(edges) - 2)
    counts = np.bincount(where, minlength=len(edges) - 1)
    width = 0.8 / len(predicted)
    for k, (flow, values) in enumerate(predicted.items()):
        error = np.abs(values - label)
        groups = [error[where == b] for b in range(len(counts))]
        mean = [group.mean() if len(group) else np.nan for group in groups]
        interval = [1.96 * group.std(ddof=1) / len(group) ** 0.5 if len(group) > 1 else 0.0 for group in groups]
        x = np.arange(len(counts)) + (k - (len(predicted) - 1) / 2) * width
        axes.bar(x, mean, 0.92 * width, color=FLOW_COLOURS[flow], label=FLOW_NAMES[flow])
        axes.errorbar(x, mean, interval, fmt="none", ecolor=INK, elinewidth=0.9, capsize=1.5)
    middle = (edges[:-1] + edges[1:]) / 2
    whole = np.allclose(middle, np.round(middle))
    names = [f"{value:+.0f}".replace("+0", "0").replace("-", "−") if whole else f"{value:.2g}" for value in middle]
    axes.set_xticks(np.arange(len(counts)), [f"{name}\nn={n}" for name, n in zip(names, counts, strict=True)])
    axes.set(xlabel="label (nearest integer)" if whole else "label (middle of bin)", ylabel="MAE (label units)")
    axes.grid(visible=False, axis="x")
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """L2 distance between all rows: [n, d], [m, d] -> [n, m]."""
    return np.sqrt(((a[:, None, :].astype(np.float64) - b[None, :, :]) ** 2).sum(-1))


def label_ticks(label: np.ndarray, classes: Sequence[str] = ()) -> tuple[np.ndarray, list[str]]:
    """Places along clips in the order of their labels [n], and what stands there: numbers, or each class amid its own.

    Of many classes those with few clips are left out, lest names overlap.
    """
    if not classes:
        places = np.unique(np.linspace(0, len(label) - 1, 6).round().astype(int)[1:-1])
        return places, [f"{label[place] + 0.0:.2g}".replace("-", "−") for place in places]  # + 0.0: no negative zero
    held = [(np.flatnonzero(label == place), name) for place, name in enumerate(classes)]
    shown = [(where.mean(), name) for where, name in held if len(where) > len(label) / 20]
    return np.array([place for place, _ in shown]), [name[:12] for _, name in shown]


def similarity(complete: np.ndarray, missing: np.ndarray, label: np.ndarray, classes: Sequence[str] = ()) -> Figure:
    """L2 distances between representations ordered by label, complete x complete beside complete x missing.

    The paper's matrix (arXiv 2410.15029, last figure) is complete x missing; within one run the distances inside the
    complete flow are what it should look like, hence one colour scale for both. [n, d], [n, d], [n] -> figure.
    Labels of `classes` are places of these.
    """
    order = np.argsort(label, kind="stable")
    complete, missing, label = complete[order], missing[order], label[order]
    matrices = [distances(complete, complete), distances(complete, missing)]
    figure = Figure(figsize=(WIDTH, 3.9))
    panels = figure.subplots(1, 2, sharey=True)
    top = max(float(np.max(matrix)) for matrix in matrices) or 1.0
    places, names = label_ticks(label, classes)
    for axes, matrix, columns in zip(panels, matrices, FLOWS, strict=True):
        image = axes.imshow(matrix, cmap="cividis", vmin=0, vmax=top, interpolation="nearest", rasterized=True)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.set_title("complete × complete" if columns == "complete" else "complete × missing")
        axes.set_xticks(places, names, rotation=30 if classes else 0)
        axes.set_yticks(places, names)
        axes.set_xlabel(f"label of the {columns} clip")
    panels[0].set_ylabel("label of the complete clip")
    bar = figure.colorbar(image, ax=list(panels), location="bottom", shrink=0.6, aspect=34, pad=0.03)
    bar.set_label("L2 distance")
    bar.outline.set_visible(False)
    return figure


def throughput(seconds: np.ndarray, clips: np.ndarray, waiting: np.ndarray) -> Figure:
    """Clips per second and the share of each step spent waiting for data, over training time.

    Args:
        seconds: [n] training time at the end of each logged step, from the first.
        clips: [n] clips per second over all ranks.
        waiting: [n] share in [0, 1].
    """
    figure = Figure(figsize=(WIDTH, 4.0))
    upper, lower = figure.subplots(2, sharex=True)
    unit, name = (3600, "h") if seconds[-1] > 2 * 3600 else (60, "min") if seconds[-1] > 180 else (1, "s")
    _curve(upper, seconds / unit, clips, NEUTRAL)
    upper.set_yscale("linear")
    upper.set_ylim(bottom=0)
    upper.set_title("Throughput (clips/s, all ranks)")
    _curve(lower, seconds / unit, waiting, NEUTRAL)
    lower.set_yscale("linear")
    lower.set_ylim(0, max(0.05, min(1.0, 1.15 * float(np.nanmax(waiting))) if np.isfinite(waiting).any() else 1.0))
    lower.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    lower.set_title("Share of the step spent waiting for data")
    lower.set_xlabel(f"training time ({name})")
    for axes in (upper, lower):
        axes.xaxis.set_major_locator(MaxNLocator(6))
    return figure


def phases(seconds: dict[str, float]) -> Figure:
    """Mean seconds of an optimizer step by phase, in the order given."""
    figure = Figure(figsize=(WIDTH, 0.9 + 0.34 * len(seconds)))
    axes = figure.add_subplot()
    bars = axes.barh(list(seconds), list(seconds.values()), color=NEUTRAL, height=0.6)
    whole = sum(seconds.values())
    axes.bar_label(bars, [f"{100 * value / whole:.0f} %" for value in seconds.values()], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("seconds per step")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    return figure


def memory(step: np.ndarray, peak: np.ndarray) -> Figure:
    """Peak memory of one rank over optimizer steps; [n] bytes, drawn in GiB."""
    figure = Figure(figsize=(WIDTH, 2.6))
    axes = figure.add_subplot()
    axes.plot(step, peak / 2**30, color=NEUTRAL, marker=_marker(step))
    axes.set(xlabel="optimizer step", ylabel="peak memory (GiB)")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure


def planned_memory(parts: dict[str, float], measured: float) -> Figure:
    """What was foretold to be held at the peak of one step, by part, above what was measured; bytes."""
    figure = Figure(figsize=(WIDTH, 2.9))
    axes = figure.add_subplot()
    shades = mpl.colormaps["viridis"](np.linspace(0.1, 0.95, max(len(parts), 2)))
    unit, name = next(((size, name) for size, name in SIZES if sum(parts.values()) >= size), SIZES[-1])
    left = 0.0
    for (part, size), shade in zip(sorted(parts.items(), key=lambda item: -item[1]), shades, strict=False):
        label = f"{part} ({size / unit:.3g} {name})"
        axes.barh("foretold", size / unit, left=left, color=shade, height=0.55, label=label)
        left += size / unit
    bars = axes.barh("measured", measured / unit, color=NEUTRAL, height=0.55)
    axes.bar_label(bars, [f"{measured / unit:.3g} {name}"], label_type="center", color="white")
    axes.invert_yaxis()
    axes.set_xlabel(f"peak memory of rank 0 in one step ({name})")
    figure.legend(loc="outside lower center", ncols=2)
    return figure
