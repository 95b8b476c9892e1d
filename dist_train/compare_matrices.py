"""Matrices of similarity ordered by label, of several settings side by side: what imagination and distillation do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from dist_train.compare import Comparison, Setting
from dist_train.figures import distances, label_ticks
from dist_train.label_order import LabelOrder
from dist_train.run_record import Representations, are_places, read_run

MOST = 8  # settings that are drawn
PANEL = 2.35  # inches
BRIGHTEST = 99  # percentile of all distances that gets the end of the colours
KINDS = {"complete": "complete × complete", "missing": "missing × missing", "between": "complete × missing"}
COLUMNS = ("setting", *KINDS.values(), "flows apart", "runs")


class Shown(NamedTuple):
    """A setting, and its first run that has representations of the split."""

    setting: Setting
    run: str
    found: Representations
    classes: list[str]  # none where labels are numbers


def shown(comparison: Comparison) -> list[Shown]:
    """Settings whose matrices can stand side by side: of the same clips as the first, which has some."""
    rows: list[Shown] = []
    first: tuple[list[str], list[float]] | None = None  # keys and labels: places of classes alone say little
    for setting in comparison.settings[:MOST]:
        for run in setting.runs:
            record = read_run(Path(run))
            found, said = record.representations, record.predictions
            if found is None or said is None or not found.split == said.split == comparison.split:
                continue
            clips = sorted(said.keys), found.label.tolist()
            first = first or clips
            if setting.label_order and clips == first:
                classes = record.task.classes if are_places(found.label.tolist(), record.task.classes) else []
                rows.append(Shown(setting, run, found, classes))
                break
    return rows


def scaled(found: Representations) -> dict[str, np.ndarray]:
    """L2 distances [n, n] by kind, clips in order of their label. Unit: the mean distance of different clips in the
    complete flow, since the size of a representation has no meaning and differs between runs.
    """
    order = np.argsort(found.label, kind="stable")
    complete, missing = found.complete[order], found.missing[order]
    own = distances(complete, complete)
    unit = own[~np.eye(len(own), dtype=bool)].mean() or 1.0
    matrices = {"complete": own, "missing": distances(missing, missing), "between": distances(complete, missing)}
    return {kind: matrix / unit for kind, matrix in matrices.items()}


def told(orders: Sequence[LabelOrder], kind: str) -> str:
    """Mean over runs, ± their standard deviation."""
    values = [getattr(order, kind) for order in orders]
    spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}".replace("-", "−")


def lines(rows: Sequence[Shown]) -> list[list[str]]:
    """The table's cells."""
    return [
        [
            row.setting.name,
            *(told(row.setting.label_order, kind) for kind in (*KINDS, "gap")),
            str(len(row.setting.label_order)),
        ]
        for row in rows
    ]


def draw(rows: Sequence[Shown]) -> Figure:
    """A row for each setting, a column for each kind, one colour scale for all."""
    figure = Figure(figsize=(3 * PANEL + 0.9, PANEL * len(rows) + 0.9))
    panels = figure.subplots(len(rows), len(KINDS), sharex=True, sharey=True, squeeze=False)
    matrices = [scaled(row.found) for row in rows]
    top = float(np.percentile([matrix for one in matrices for matrix in one.values()], BRIGHTEST)) or 1.0
    places, names = label_ticks(np.sort(rows[0].found.label), rows[0].classes)
    for line, row, of in zip(panels, rows, matrices, strict=True):
        for axes, (kind, title) in zip(line, KINDS.items(), strict=True):
            image = axes.imshow(of[kind], cmap="cividis", vmin=0, vmax=top, interpolation="nearest", rasterized=True)
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
            axes.set_title(f"{title}: ρ {told(row.setting.label_order, kind)}")
            axes.set_xticks(places, names)
            axes.set_yticks(places, names)
        line[0].set_ylabel(f"{short(row.setting.name)}\n\nlabel")
    for axes in panels[-1]:
        axes.set_xlabel("label")
    bar = figure.colorbar(image, ax=list(panels.flat), location="bottom", shrink=0.5, aspect=40, pad=0.02)
    bar.set_label("L2 distance (1: mean of different clips in the complete flow)")
    bar.outline.set_visible(False)
    return figure


def short(name: str) -> str:
    """A setting's name as text of a narrow figure."""
    name = name.replace("$", r"\$")
    return name if len(name) <= 36 else f"{name[:35]}…"
