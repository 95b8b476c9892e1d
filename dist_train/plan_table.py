"""A plan on one screen."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dist_train.plan import Plan, Prediction
from sharding.hardware import GIB

TERA, GIGA = 1e12, 1e9
SMALL = 0.003  # share of the peak below which parts are put together


def plan_table(plan: Plan) -> RenderableType:
    """Everything a plan says."""
    predicted = plan.predicted
    world = f"{plan.nodes} × {plan.per_node} {plan.hardware.name}"
    return Group(
        Text(f"{world}, {plan.hardware.memory / GIB:.0f} GiB each. Lengths: {plan.corpus}.\n"),
        memory_table(plan, predicted),
        cost_table(predicted),
        choice_table(plan),
        scaling_table(plan),
        *(Text(f"Note: {note}") for note in plan.notes),
    )


def table(title: str, *columns: str) -> Table:
    """A table with its first column to the left."""
    made = Table(title=title, title_justify="left", title_style="bold", min_width=78)
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right")
    return made


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.2f} MiB"


def memory_table(plan: Plan, predicted: Prediction) -> Table:
    """What is held at the peak."""
    made = table(
        f"Memory of a GPU at its peak ({predicted.peak_moment}; ZeRO-{predicted.zero_stage}, "
        f"{predicted.clips} clips per micro-batch, {predicted.micro_steps} micro-step(s))",
        "held",
        "size",
    )
    rest = 0
    for name, held in sorted(predicted.peak_parts.items(), key=lambda part: -part[1]):
        if held < SMALL * predicted.peak_bytes:
            rest += held
        else:
            made.add_row(name, size(held))
    made.add_row("others", size(rest))
    made.add_row("gaps, CUDA, NCCL (estimate)", size(predicted.device_bytes - predicted.peak_bytes))
    made.add_section()
    verdict = "fits" if predicted.device_bytes <= plan.hardware.memory else "does not fit"
    made.add_row(f"together: {verdict}", size(predicted.device_bytes))
    if predicted.host_bytes:
        made.add_row("on the host, per GPU", size(predicted.host_bytes))
    made.add_row("host memory of a node while models load", size(predicted.loading_bytes))
    made.add_row("a checkpoint on disk", size(predicted.checkpoint_bytes))
    made.add_row("its copy on the host, per GPU", size(predicted.checkpoint_bytes / predicted.world))
    return made


def cost_table(predicted: Prediction) -> Table:
    """Arithmetic, exchange and time of a typical step."""
    made = table("A typical step of a GPU", "", "amount", "seconds")
    seconds = predicted.seconds
    for phase, name in (("decode", "decoding"), ("forward", "forward"), ("backward", "backward")):
        if predicted.flops.get(phase):
            made.add_row(name, f"{predicted.flops[phase] / TERA:.2f} TFLOP", phase_seconds(seconds, phase))
    made.add_row("forward and backward together", "", f"{seconds['compute']:.3f}")
    for name, size in predicted.wire_bytes.items():
        if size:
            made.add_row(name.replace("_", "-"), f"{size / GIGA:.3f} GB", "")
    links = predicted.link_bytes
    sent = f"{links['inside'] / GIGA:.2f} GB per GPU, {links['between'] / GIGA:.2f} GB between nodes"
    made.add_row("exchange", sent, f"{seconds['exchange']:.3f}")
    made.add_row("update", "", f"{seconds['update']:.3f}")
    made.add_section()
    made.add_row("the step", "", f"{seconds['step']:.3f}")
    if predicted.epoch_seconds and predicted.clips_per_second:
        rate = f"{predicted.clips_per_second:.0f} clips/s over all GPUs"
        made.add_row("an epoch", rate, f"{predicted.epoch_seconds:.0f}")
    return made


def phase_seconds(seconds: dict[str, float], phase: str) -> str:
    """Only decoding is timed by itself."""
    return f"{seconds[phase]:.3f}" if phase in seconds else ""


def choice_table(plan: Plan) -> Table:
    """Candidates with verdicts."""
    made = table("What fits best", "ZeRO", "micro-steps", "clips each", "GiB", "seconds", "verdict")
    made.columns[-1].justify = "left"
    for index, candidate in enumerate(plan.candidates):
        made.add_row(
            str(candidate.zero_stage),
            str(candidate.micro_steps),
            str(candidate.clips),
            f"{candidate.device_bytes / GIB:.1f}",
            f"{candidate.step_seconds:.3f}",
            candidate.verdict,
            style="bold" if index == plan.best else None,
        )
    return made


def scaling_table(plan: Plan) -> Table:
    """More nodes."""
    made = table("The same global batch on more GPUs", "GPUs", "clips each", "seconds", "of perfect scaling")
    for entry in plan.scaling:
        row: Iterable[str] = (
            str(entry.world),
            f"{entry.clips:.1f}",
            f"{entry.step_seconds:.3f}",
            f"{entry.efficiency:.0%}",
        )
        made.add_row(*row)
    return made
