"""A comparison on the terminal, as JSON, and on one self-contained page."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jinja2
import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from dist_train import compare_matrices, figures
from dist_train.compare import Comparison, FlowScore, Setting, compare
from dist_train.compare_matrices import Shown
from dist_train.figures import FLOW_COLOURS, FLOW_NAMES, INK, WIDTH
from dist_train.names import FLOWS
from dist_train.scaling_page import replace
from dist_train.task import MEASURES
from sharding.errors import UserError

NONE = "–"
MOST_CHANGES = 4
AGAINST = "against the first"
TITLES = {"mae": "MAE", "accuracy": "accuracy"}
COUNTED = {
    "mae": "MAE in label units, mean over runs that differ in their seed alone, ± their standard deviation. "
    "Differences: over the clips both settings have, errors averaged over seeds",
    "accuracy": "Accuracy (and macro-F1), mean over runs that differ in their seed alone, ± their standard deviation. "
    "Differences of accuracy: over the clips both settings have, right answers averaged over seeds",
}
ANSWERS = {"mae": MEASURES["regression"].answer, "accuracy": MEASURES["classification"].answer}


def write_comparison(directories: Sequence[Path], output: Path | None) -> tuple[Comparison, Path]:
    """Writes comparison.html, .json, .png and comparison_similarity.png; returns what was found, and the page's path.

    Args:
        output: directory, made if need be. Default: the folder that holds all runs.

    Raises:
        UserError, UserErrors: runs that cannot be compared; a directory that cannot be written to.
    """
    found = compare(directories)
    folder = output or Path(os.path.commonpath([path.resolve().parent for path in directories]))
    if output is None and folder == Path(folder.anchor):
        raise UserError("--output", "is not given, and the runs have no folder in common", "Name a directory.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        png = figures.render(partial(draw, found))
        replace(folder / "comparison.png", png)
        replace(folder / "comparison.json", found.model_dump_json(indent=1).encode())
        rows = compare_matrices.shown(found)
        matrices = figures.render(partial(compare_matrices.draw, rows)) if rows else b""
        if rows:
            replace(folder / "comparison_similarity.png", matrices)
        page = folder / "comparison.html"
        replace(page, html(found, png, rows, matrices).encode())
    except OSError as error:
        raise UserError(str(folder), f"cannot be written ({error.strerror})", "Give another --output.") from None
    return found, page


def columns(found: Comparison) -> list[str]:
    """Titles of the table."""
    flows = [title for flow in FLOWS for title in (f"{flow} {TITLES[found.metric]}", AGAINST)]
    f1 = [f"{flow} macro-F1" for flow in FLOWS if found.metric == "accuracy"]
    return ["setting", "runs", *flows, *f1, "floor", "changes"]


def mean(values: Sequence[float]) -> str:
    """Mean and deviation over seeds."""
    deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{deviation}"


def change(score: FlowScore) -> str:
    """Difference to the first setting, its interval, and p."""
    if score.difference is None or score.interval is None or score.p is None:
        return NONE
    low, high = score.interval
    p = "p < 0.001" if score.p < 1e-3 else f"p = {score.p:.3f}"
    return f"{score.difference:+.3f} [{low:+.3f}, {high:+.3f}], {p}".replace("-", "−")


def lines(found: Comparison) -> list[list[str]]:
    """The table's cells."""
    return [
        [
            one.name,
            str(len(one.runs)),
            *(text for flow in FLOWS for text in (mean(one.flows[flow].by_seed), change(one.flows[flow]))),
            *(mean(one.flows[flow].macro_f1) for flow in FLOWS if found.metric == "accuracy"),
            NONE if one.floor is None else f"{one.floor:.3f}",
            changes(one),
        ]
        for one in found.settings
    ]


def changes(one: Setting) -> str:
    """What the recipe has other than the first setting's."""
    shown = [f"{key}={value}" for key, value in list(one.changes.items())[:MOST_CHANGES]]
    more = len(one.changes) - len(shown)
    return " ".join(shown) + (f" and {more} more" if more else "")


def comparison_table(found: Comparison) -> Table:
    """A line a setting."""
    table = Table(title=f"{found.split} split; differences: 95 % interval, paired bootstrap over clips")
    titles = columns(found)
    for number, column in enumerate(titles):
        table.add_column(column, justify="left" if number in (0, len(titles) - 1) else "right")
    for line in lines(found):
        table.add_row(*line)
    return table


def draw(found: Comparison) -> Figure:
    """The metric of both flows of each setting: a dot a seed, a bar the mean."""
    figure = Figure(figsize=(WIDTH, 1.2 + 0.34 * len(found.settings)))
    axes = figure.add_subplot()
    for flow, shift in zip(FLOWS, (-0.14, 0.14), strict=True):
        for line, one in enumerate(found.settings):
            values = one.flows[flow].by_seed
            axes.plot(values, [line + shift] * len(values), "o", color=FLOW_COLOURS[flow], alpha=0.55, markersize=4)
            axes.plot(one.flows[flow].mean, line + shift, "|", color=FLOW_COLOURS[flow], markersize=10)
        axes.plot([], [], "o", color=FLOW_COLOURS[flow], label=FLOW_NAMES[flow])
    floors = {one.floor for one in found.settings}
    if len(floors) == 1 and (floor := floors.pop()) is not None:
        axes.axvline(floor, color=INK, linestyle="--", linewidth=1, label="floor")
    axes.set_yticks(range(len(found.settings)), [one.name.replace("$", r"\$")[:40] for one in found.settings])
    axes.set_ylim(len(found.settings) - 0.4, -0.6)
    axes.set_xlabel(f"{TITLES[found.metric]}, {found.split} split")
    figure.legend(loc="outside upper right", ncols=3)
    return figure


def html(found: Comparison, png: bytes, rows: Sequence[Shown], matrices: bytes) -> str:
    """The page.

    Args:
        matrices: PNG of the similarity of `rows`, empty where no run has representations.
    """
    loader = jinja2.PackageLoader("dist_train", "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    image, similarity = ("data:image/png;base64," + base64.b64encode(part).decode() for part in (png, matrices))
    return environment.get_template("comparison.html.j2").render(
        found=found,
        columns=columns(found),
        lines=lines(found),
        image=image,
        title=TITLES[found.metric],
        counted=COUNTED[found.metric],
        answer=ANSWERS[found.metric],
        similarity=similarity if matrices else "",
        matrices=rows,
        order_columns=compare_matrices.COLUMNS,
        order_lines=compare_matrices.lines(rows),
    )
