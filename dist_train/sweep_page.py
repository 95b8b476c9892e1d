"""The figure and the page of a sweep: the main metric of both flows over what was varied."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dist_train.figures import FLOW_COLOURS, FLOW_NAMES, NEUTRAL, WIDTH, render
from dist_train.names import FLOWS
from dist_train.task import MEASURES, Measure

Row = dict[str, Any]  # of the table, by column
MOST_SHOWN = 40  # settings in the figure, the best
MOST_TICKS = 5  # numbers of several digits below half a figure
LONGEST = 60  # characters of a label


def write_page(directory: Path, rows: Sequence[Row], varied: Sequence[str]) -> list[Path]:
    """Writes sweep.png and sweep.html. Returns their paths; the page alone if no point has a score yet.

    Args:
        rows: a row a point; the columns test.complete.mae (macro_f1 of classifiers) and so on are read.
        varied: columns in which points differ.

    Raises:
        OSError: the place refuses.
    """
    split = next((s for s in ("test", "valid") if any(has_score(row, s) for row in rows)), None)
    page, image = directory / "sweep.html", directory / "sweep.png"
    png = b"" if split is None else render(partial(draw, rows, varied, split))
    if png:
        image.write_bytes(png)
    loader = jinja2.PackageLoader("dist_train", "templates")
    template = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.write_text(
        template.get_template("sweep.html.j2").render(
            name=directory.name,
            rows=[shown_row(directory, row, varied, split or "test", measure_of(rows)) for row in rows],
            varied=varied,
            split=split or "test",
            measure=measure_of(rows),
            published=any(is_published(row) for row in rows),
            image="data:image/png;base64," + base64.b64encode(png).decode() if png else "",
        ),
        encoding="utf-8",
    )
    return [image, page] if png else [page]


def is_published(row: Row) -> bool:
    """Whether the literature has a number for this point."""
    return any(
        row.get(f"published.{flow}.{measure.main}") is not None for flow in FLOWS for measure in MEASURES.values()
    )


def measure_of(rows: Sequence[Row]) -> Measure:
    """What the points are judged by: of a sweep of both kinds, what classifiers are; the others are then not shown."""
    classifies = any(row.get(f"{split}.missing.macro_f1") is not None for row in rows for split in ("test", "valid"))
    return MEASURES["classification" if classifies else "regression"]


def has_score(row: Row, split: str) -> bool:
    """Whether a point was scored on a split."""
    return any(row.get(f"{split}.missing.{measure.main}") is not None for measure in MEASURES.values())


def settings_of(rows: Sequence[Row], varied: Sequence[str], split: str) -> list[tuple[dict[str, Any], list[Row]]]:
    """Scored points that differ in their seed alone, together; in order. Points that were given names go by these."""
    found: dict[str, tuple[dict[str, Any], list[Row]]] = {}
    keys = [key for key in varied if key != "seed"]
    for row in rows:
        if has_score(row, split):
            named = all(one.get("setting") for one in rows)
            values = {"setting": row["setting"]} if named else {key: row[key] for key in keys}
            world = {"ranks": row["world_size"]} if len({one.get("world_size") for one in rows}) > 1 else {}
            found.setdefault(repr((values, world)), ({**values, **world}, []))[1].append(row)
    return list(found.values())


def draw(rows: Sequence[Row], varied: Sequence[str], split: str) -> Figure:
    """The main metric of both flows for each setting, a dot a seed; a curve where one number alone was varied."""
    measure = measure_of(rows)
    rows = [row for row in rows if row.get(f"{split}.missing.{measure.main}") is not None]
    settings = settings_of(rows, varied, split)
    numbers = [only(values) for values, _ in settings if len(values) == 1]
    if len(settings) > 2 and len(numbers) == len(settings) and all(is_number(value) for value in numbers):
        return curve(settings, split, measure)
    return dots(settings, split, measure)


def only(values: dict[str, Any]) -> Any:
    """The value of a mapping that has one."""
    return next(iter(values.values()))


def is_number(value: Any) -> bool:
    """Whether it can stand on an axis."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def curve(settings: Sequence[tuple[dict[str, Any], list[Row]]], split: str, measure: Measure) -> Figure:
    """The main metric over one number; the lines are means over seeds."""
    settings = sorted(settings, key=lambda setting: only(setting[0]))
    x = np.array([only(values) for values, _ in settings], dtype=float)
    figure = Figure(figsize=(WIDTH, 3.4))
    axes = figure.add_subplot()
    for flow in FLOWS:
        reached = [values_of(points, split, flow, measure) for _, points in settings]
        for place, values in zip(x, reached, strict=True):
            axes.plot([place] * len(values), values, "o", color=FLOW_COLOURS[flow], alpha=0.45, markersize=4)
        axes.plot(x, [np.mean(values) for values in reached], color=FLOW_COLOURS[flow], label=FLOW_NAMES[flow])
    floor(axes, settings, f"{split}.floor.{measure.main}", vertical=False)
    if x.min() > 0 and x.max() > 30 * x.min():
        axes.set_xscale("log")
    axes.set_xlabel(label(next(iter(settings[0][0]))))
    axes.set_ylabel(f"{measure.title}, {split} split")
    axes.legend()
    return figure


def dots(settings: Sequence[tuple[dict[str, Any], list[Row]]], split: str, measure: Measure) -> Figure:
    """A line for each setting, the best if there are many; bars are means over seeds."""
    if len(settings) > MOST_SHOWN:
        best = sorted(
            settings,
            key=lambda setting: measure.loss(
                float(np.mean([values_of(setting[1], split, flow, measure) for flow in FLOWS]))
            ),
        )
        settings = [setting for setting in settings if any(setting is one for one in best[:MOST_SHOWN])]
    published = any(is_published(row) for _, points in settings for row in points)
    figure = Figure(figsize=(WIDTH + 1, 1.2 + 0.3 * len(settings)))
    axes, *others = figure.subplots(1, 1 + published, sharey=True, squeeze=False)[0]
    for beside in others:  # other data, so an axis of its own
        for flow in FLOWS:
            told = [points[0].get(f"published.{flow}.{measure.main}") for _, points in settings]
            found = [(value, line) for line, value in enumerate(told) if value is not None]
            beside.plot(*zip(*found, strict=True), "D", color=FLOW_COLOURS[flow], fillstyle="none", markersize=5)
        beside.set_xlabel(f"{measure.title} as published")
        beside.xaxis.set_major_locator(MaxNLocator(MOST_TICKS))
    for flow, shift in zip(FLOWS, (-0.14, 0.14), strict=True):
        for line, (_, points) in enumerate(settings):
            values = values_of(points, split, flow, measure)
            axes.plot(values, [line + shift] * len(values), "o", color=FLOW_COLOURS[flow], alpha=0.55, markersize=4)
            axes.plot(np.mean(values), line + shift, "|", color=FLOW_COLOURS[flow], markersize=9)
        axes.plot([], [], "o", color=FLOW_COLOURS[flow], label=FLOW_NAMES[flow])
    floor(axes, settings, f"{split}.floor.{measure.main}", vertical=True)
    names = [
        ", ".join(
            str(value) if key == "setting" else f"{key.rpartition('.')[2]} {shown(value)}" for key, value in one.items()
        )
        for one, _ in settings
    ]
    axes.set_yticks(range(len(settings)), [label(name or "all points") for name in names])
    axes.set_ylim(len(settings) - 0.4, -0.6)
    axes.set_xlabel(f"{measure.title}, {split} split")
    axes.xaxis.set_major_locator(MaxNLocator(MOST_TICKS))
    figure.legend(loc="outside upper right", ncols=3)
    return figure


def values_of(points: Sequence[Row], split: str, flow: str, measure: Measure) -> list[float]:
    """The main metric of each point."""
    return [float(row[f"{split}.{flow}.{measure.main}"]) for row in points]


def floor(axes: Axes, settings: Sequence[tuple[dict[str, Any], list[Row]]], column: str, *, vertical: bool) -> None:
    """The trivial floor, where all points share it."""
    found = {float(row[column]) for _, points in settings for row in points if row.get(column) is not None}
    if found and max(found) - min(found) < 1e-6 * max(found):
        line = axes.axvline if vertical else axes.axhline
        line(found.pop(), color=NEUTRAL, linestyle="--", linewidth=1, label="floor")


def label(text: str) -> str:
    """Text of a figure: matplotlib reads what stands between dollars as TeX."""
    return (text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…").replace("$", r"\$")


def shown(value: Any) -> str:
    """A value in a label or cell."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def shown_row(directory: Path, row: Row, varied: Sequence[str], split: str, measure: Measure) -> dict[str, Any]:
    """A line of the page's table."""
    scores = [row.get(f"{split}.{part}.{measure.main}") for part in ("complete", "missing", "gap", "floor")]
    return {
        "point": row["point"],
        "report": f"{row['point']}/report.html" if (directory / row["point"] / "report.html").is_file() else "",
        "values": [shown(row[key]) for key in varied],
        "state": row["state"],
        "reason": row["reason"] or "",
        "published": [shown(row.get(f"published.{flow}.{measure.main}")) for flow in FLOWS],
        "scores": ["–" if score is None else f"{score:.3f}".replace("-", "−") for score in scores],
        "steps": shown(row["steps"]),
        "pace": shown(row["clips_per_second"]),
        "ranks": shown(row["world_size"]),
    }
