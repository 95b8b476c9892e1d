"""Scaling on the terminal, on one self-contained page, and as JSON."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import jinja2
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dist_train import figures, scaling_figures
from dist_train.scaling import Figure, Point, Scaling, Series, measure_scaling, name_of
from sharding.errors import UserError

NONE = "–"
DEFINITIONS = (
    "Efficiency: clips per second and rank, as a share of the first row's. Under a number: its 95 % interval. "
    "Foretold: by the planner, for a typical step on the named hardware (plan.json)."
)
Row = tuple[str, ...]


def write_scaling(places: Sequence[Path], output: Path | None) -> tuple[Scaling, Path]:
    """Writes scaling.html, scaling.json and a figure per series; returns what was found, and the page's path.

    Args:
        places: run directories, or folders of them.
        output: directory, made if need be. Default: the folder that holds all runs.

    Raises:
        UserErrors: no run can be read, or runs that cannot be compared are mixed.
        UserError: the directory cannot be written to.
    """
    found = measure_scaling(places)
    folder = output or common(found, places)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        images = []
        for series in found.series:
            png = figures.render(partial(scaling_figures.measured, found, series))
            replace(folder / f"scaling_{series.kind}_{series.clips:g}.png", png)
            images.append("data:image/png;base64," + base64.b64encode(png).decode())
        replace(folder / "scaling.json", found.model_dump_json(indent=1).encode())
        page = folder / "scaling.html"
        replace(page, html(found, images).encode())
    except OSError as error:
        raise UserError(str(folder), f"cannot be written ({error.strerror})", "Give another --output.") from None
    return found, page


def common(found: Scaling, places: Sequence[Path]) -> Path:
    """The folder given, or the one that all runs lie in.

    Raises:
        UserError: that is the root of the file system.
    """
    runs = [Path(run) for point in found.points for run in point.runs]
    if len(places) == 1 and places[0].resolve() not in runs:
        return places[0]
    folder = Path(os.path.commonpath([run.parent for run in runs]))
    if folder == Path(folder.anchor):
        raise UserError("--output", "is not given, and the runs have no folder in common", "Name a directory.")
    return folder


def replace(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all; a link of this name is replaced, not followed."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    with temporary.open("xb") as file:
        file.write(content)
    temporary.replace(path)


def shown(value: Figure | None, form: Callable[[float], str]) -> str:
    """A number, and under it its interval."""
    if value is None:
        return NONE
    if value.low is None or value.high is None:
        return form(value.value)
    return f"{form(value.value)}\n{form(value.low)}–{form(value.high)}"


def significant(value: float) -> str:
    """Three significant digits, thousands whole."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(value: float) -> str:
    """A share."""
    return f"{value:.1%}" if abs(value) < 0.1 else f"{value:.0%}"


def plain(value: float | None, form: Callable[[float], str]) -> str:
    """A number that may be absent."""
    return NONE if value is None else form(value)


def milliseconds(value: float) -> str:
    """Of seconds."""
    return f"{1e3 * value:.1f}"


def megabytes(value: float) -> str:
    """Of bytes."""
    return f"{value / 1e6:.3f}"


PACE = ("", "runs", "steps", "clips/s", "tokens/s", "MFU", "efficiency", "foretold")
STEP = ("", "clips per step", "seconds per step", "foretold", "overhead, ms")
EXCHANGE = ("", "clips per step", "share of the step", "foretold", "waiting", "sent, MB", "foretold")


def pace_rows(scaling: Scaling, series: Series) -> Iterable[Row]:
    """What a series reaches."""
    for entry in series.entries:
        point = scaling.points[entry.point]
        yield (
            name_of(point),
            str(len(point.runs)),
            str(point.steps),
            shown(point.clips_per_second, significant),
            shown(point.tokens_per_second, significant),
            shown(point.mfu, percent),
            shown(entry.efficiency, percent),
            plain(entry.foretold_efficiency, percent),
        )


def step_rows(points: Sequence[Point]) -> Iterable[Row]:
    """What a step takes."""
    for point in points:
        overhead = [value for value in (point.unnamed_seconds, point.between_seconds) if value is not None]
        yield (
            name_of(point),
            str(point.batch),
            shown(point.step_seconds, significant),
            plain(point.foretold.step_seconds if point.foretold else None, significant),
            plain(sum(overhead) if overhead else None, milliseconds),
        )


def exchange_rows(points: Sequence[Point]) -> Iterable[Row]:
    """What exchange takes of it."""
    for point in points:
        yield (
            name_of(point),
            str(point.batch),
            shown(point.exchange_share, percent),
            plain(point.foretold.exchange_share if point.foretold else None, percent),
            plain(point.waiting_share, percent),
            plain(point.wire.sent if point.wire else None, megabytes),
            plain(point.wire.foretold_sent if point.wire else None, megabytes),
        )


def title(series: Series) -> str:
    """What stays the same."""
    if series.kind == "weak":
        return f"Weak scaling: {series.clips:g} clips per rank and step"
    return f"Strong scaling: {series.clips:g} clips per step over all ranks"


def rich_table(name: str, columns: Row, rows: Iterable[Row]) -> Table:
    """For the terminal."""
    made = Table(title=name, title_justify="left", title_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column else "left")
    for row in rows:
        made.add_row(*row)
    return made


def scaling_table(scaling: Scaling) -> RenderableType:
    """Everything, on the terminal."""
    parts: list[RenderableType] = [
        rich_table(title(series), PACE, pace_rows(scaling, series)) for series in scaling.series
    ]
    parts.append(rich_table("A step of rank 0", STEP, step_rows(scaling.points)))
    parts.append(rich_table("Rank 0 in collectives", EXCHANGE, exchange_rows(scaling.points)))
    hardware = {point.foretold.hardware for point in scaling.points if point.foretold}
    parts.append(Text(f"Measured on: {scaling.hardware}. Foretold for: {', '.join(sorted(hardware)) or NONE}."))
    parts += [Text(f"Note: {note}") for note in scaling.notes]
    return Group(Text(DEFINITIONS), *parts)


def html(scaling: Scaling, images: Sequence[str]) -> str:
    """The page."""
    loader = jinja2.PackageLoader("dist_train", "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    series = [
        {"title": title(one), "columns": PACE, "rows": list(pace_rows(scaling, one)), "image": image}
        for one, image in zip(scaling.series, images, strict=True)
    ]
    return environment.get_template("scaling.html.j2").render(
        hardware=scaling.hardware,
        definitions=DEFINITIONS,
        series=series,
        steps=(STEP, list(step_rows(scaling.points))),
        exchange=(EXCHANGE, list(exchange_rows(scaling.points))),
        notes=scaling.notes,
        runs=[(name_of(point), point.runs) for point in scaling.points],
        flow_colours=figures.FLOW_COLOURS,
    )
