"""The planner's scaling curve as tables and as a figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.console import Group, RenderableType
from rich.text import Text

from dist_train import figures
from dist_train.figures import FAINT, INK, NEUTRAL, WIDTH
from dist_train.plan_table import GIGA, table
from dist_train.scaling_figures import KINDS, PERCENT, gap, gathered
from dist_train.scaling_model import LATER, SLOWER, Curve, World
from sharding.errors import UserError

PARTS = {"decode": "#56b4e9", "compute": NEUTRAL, "exchange": "#e69f00"}


def write_curve(made: Curve, path: Path) -> Path:
    """Writes JSON to `path`, and a figure of the same name beside it; returns the figure's path.

    Raises:
        UserError: the place cannot be written to.
    """
    image = path.with_suffix(".png")
    try:
        path.write_text(made.model_dump_json(indent=1), encoding="utf-8")
        image.write_bytes(figures.render(lambda: curve(made)))
    except OSError as error:
        raise UserError(
            str(path), f"cannot be written ({error.strerror})", "Name a file in a directory you may write to."
        ) from None
    return image


def curve_table(made: Curve) -> RenderableType:
    """Both curves, what they rest on, and where they end."""
    first = made.weak[0]
    return Group(
        Text(
            "Efficiency: clips/s and GPU, as a share of the first row's. Slower: the same with links "
            f"{SLOWER} times slower and collectives {LATER} times later. Even: if every rank had the clips of the "
            "first row's slowest rank. Each: clips per GPU. Sent: by a GPU, or by a node to the next.\n"
        ),
        scale_table(f"Weak scaling: {first.clips:g} clips per GPU and step", "even", made.weak),
        scale_table(f"Strong scaling: {first.batch} clips per step", "each", made.strong),
        Text("Foretold with:"),
        *(Text(f"- {one}") for one in made.assumptions),
        *(Text(f"Note: {note}") for note in made.notes),
    )


def scale_table(title: str, last: str, worlds: Sequence[World]) -> RenderableType:
    """A row per world."""
    made = table(title, "GPUs", "seconds", "clips/s", "efficiency", "slower", "exchange", "sent, GB", last)
    for world in worlds:
        even = "–" if world.even_efficiency is None else f"{world.even_efficiency:.0%}"
        made.add_row(
            str(world.gpus),
            f"{world.step_seconds:.3f}",
            f"{world.clips_per_second:.0f}",
            f"{world.efficiency:.0%}",
            f"{world.slow_efficiency:.0%}",
            f"{world.exchange_share:.2%}",
            f"{max(world.link_bytes.values()) / GIGA:.3f}",
            even if last == "even" else f"{world.clips:.1f}",
        )
    return made


def curve(made: Curve) -> Figure:
    """The planner's weak and strong scaling: clips per second, efficiency, what a step's time goes into."""
    figure = Figure(figsize=(WIDTH, 5.6))
    upper, lower = figure.subplots(2, 2)
    kinds = {"weak": made.weak, "strong": made.strong}
    panels = [*upper, *lower]
    upper[0].set_title("Clips per second")
    upper[1].set_title("Efficiency")
    for kind, worlds in kinds.items():
        gpus = [world.gpus for world in worlds]
        label = f"{kind}: {name(worlds[0], kind)}"
        line(upper[0], worlds, lambda world: world.clips_per_second, KINDS[kind], label)
        line(upper[1], worlds, lambda world: world.efficiency, KINDS[kind], None)
        low = [world.slow_efficiency for world in worlds]
        upper[1].fill_between(
            gpus, low, [world.efficiency for world in worlds], color=KINDS[kind], alpha=0.2, linewidth=0
        )
    first = made.weak[0]
    ideal = [first.clips_per_second * world.gpus / first.gpus for world in made.weak]
    upper[0].plot([world.gpus for world in made.weak], ideal, color=FAINT, linewidth=3, zorder=0, label="in proportion")
    upper[0].set_yscale("log")
    upper[0].yaxis.set_major_formatter("{x:g}")
    even = [world for world in made.weak if world.even_efficiency is not None]
    if even:
        gpus = [world.gpus for world in even]
        upper[1].plot(gpus, [gap(world.even_efficiency) for world in even], color=KINDS["weak"], linestyle=":",
                      label="weak, if all ranks had like clips")  # fmt: skip
    upper[1].axhline(1, color=FAINT, linewidth=3, zorder=0)
    upper[1].yaxis.set_major_formatter(PERCENT)
    upper[1].set_ylim(0, 1.08)
    for axes, (kind, worlds) in zip(lower, kinds.items(), strict=True):
        stack(axes, worlds)
        axes.set_title(f"Seconds of a step, {kind}")
        axes.set_xlabel("GPUs")
    for axes in panels:
        axes.set_xscale("log", base=2)
        ticks = [world.gpus for world in made.weak]
        axes.set_xticks(ticks[:: 1 + len(ticks) // 5])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(ticks[0] / 1.15, ticks[-1] * 1.15)
    figure.legend(*gathered(panels), loc="outside upper left", ncols=2, columnspacing=1.2)
    return figure


def name(world: World, kind: str) -> str:
    """What stays the same."""
    return f"{world.clips:g} clips per GPU" if kind == "weak" else f"batch {world.batch}"


def line(axes: Axes, worlds: Sequence[World], value: Callable[[World], float], colour: str, label: str | None) -> None:
    """One value over GPUs."""
    axes.plot(
        [world.gpus for world in worlds], [value(world) for world in worlds], color=colour, marker="o", markersize=3.5,
        label=label,
    )  # fmt: skip


def stack(axes: Axes, worlds: Sequence[World]) -> None:
    """What the step's time goes into, from below."""
    gpus = [world.gpus for world in worlds]
    shown = [[world.seconds[part] for world in worlds] for part in PARTS]
    axes.stackplot(gpus, shown, colors=list(PARTS.values()), labels=list(PARTS))
    axes.plot(gpus, [world.step_seconds for world in worlds], color=INK, linewidth=1)
    axes.set_ylim(bottom=0)
