"""The planner's scaling curve of a recipe over many GPUs, with everything it assumes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from copy import copy

from pydantic import BaseModel, ConfigDict, Field

from dist_train.plan import Planner, Prediction, predict_epoch
from dist_train.plan_corpus import Corpus, Load, corpus_of, load_of
from dist_train.recipe import Recipe
from sharding.errors import UserError
from sharding.hardware import GIB, Hardware

MOST = 2**20  # GPUs
SLOWER, LATER = 4, 10  # the pessimistic case: links by so many times slower, collectives by so many times later
POOR = 0.8  # efficiency below which the reason is told
FEW = 10  # steps per epoch below which their middle one is rough


class World(BaseModel):
    """A step on so many GPUs, as foretold for its slowest rank."""

    model_config = ConfigDict(extra="forbid")

    gpus: int
    nodes: int
    batch: int = Field(description="Clips of a step over all GPUs.")
    clips: float = Field(description="Per GPU, on average.")
    micro_steps: int
    step_seconds: float
    seconds: dict[str, float] = Field(description="decode, compute, exchange, update; ZeRO-3 hides some behind others.")
    clips_per_second: float = Field(description="Of all GPUs.")
    efficiency: float = Field(description="Clips per second and GPU, of the first world's.")
    slow_efficiency: float = Field(description=f"With links {SLOWER} times slower and collectives {LATER} times later.")
    even_efficiency: float | None = Field(description="Weak: if each rank had the clips of the first world's slowest.")
    exchange_share: float
    wire_bytes: dict[str, int] = Field(description="Whole tensors given to each collective.")
    link_bytes: dict[str, float] = Field(description="Sent by a GPU inside its node (inside), by a node (between).")
    device_bytes: int
    fits: bool


class Curve(BaseModel):
    """What `dist-train plan --scale` tells."""

    model_config = ConfigDict(extra="forbid")

    hardware: Hardware
    per_node: int
    zero_stage: int
    weak: list[World]
    strong: list[World]
    assumptions: list[str]
    notes: list[str]


def read_scale(text: str, per_node: int) -> list[int]:
    """`8..512` → 8, 16, … 512, by doubling.

    Raises:
        UserError: it is no such range, or one whose worlds do not fill whole nodes.
    """
    found = re.fullmatch(r"(\d{1,7})\.\.(\d{1,7})", text)
    first, last = map(int, found.groups()) if found else (0, 0)
    if not 1 <= first <= last <= MOST:
        raise UserError("--scale", f"cannot be {text!r}", "Write the smallest and the largest world, such as 8..512.")
    worlds = [first * 2**power for power in range(int(math.log2(last / first)) + 1)]
    odd = next((world for world in worlds if world % min(world, per_node)), None)
    if odd is not None:
        raise UserError("--scale", f"{odd} GPUs do not fill nodes of {per_node}", f"Begin with {per_node} GPUs.")
    return worlds


def model_scaling(recipe: Recipe, hardware: Hardware, worlds: Sequence[int], per_node: int) -> Curve:
    """Weak scaling, with the recipe's batch on the first world, and strong scaling of that batch.

    Raises:
        UserError: the recipe's models or data do not allow a plan, or its batch cannot feed the first world.
    """
    recipe, corpus = corpus_of(recipe)
    most = recipe.data.batch // recipe.training.accumulation
    if most < worlds[0]:
        raise UserError(
            "data.batch", f"is {recipe.data.batch}: it feeds at most {most} GPUs, --scale begins with {worlds[0]}",
            "Begin with a smaller world, or write a larger data.batch.",
        )  # fmt: skip
    planner = Planner(recipe, None, hardware, 1, min(worlds[0], per_node))
    feeds = [world for world in worlds if world <= most]
    if feeds[-1] < most < worlds[-1] and most % min(most, per_node) == 0:
        feeds.append(most)
    weak: list[World] = []
    strong: list[World] = []
    loads: list[Load] = []
    for world in worlds:
        batch = recipe.data.batch * world // worlds[0]
        larger = recipe.model_copy(update={"data": recipe.data.model_copy(update={"batch": batch})})
        loads.append(load_of(larger, corpus, world))
        weak.append(foretell(planner_for(planner, larger, world, per_node), loads[-1], weak, even=loads[0]))
    for world in feeds:
        load = load_of(recipe, corpus, world)
        strong.append(foretell(planner_for(planner, recipe, world, per_node), load, strong))
    notes = [*planner.notes, *remarks(recipe, weak, strong, loads[-1], worlds[-1])]
    return Curve(
        hardware=hardware,
        per_node=per_node,
        zero_stage=recipe.zero.stage,
        weak=weak,
        strong=strong,
        assumptions=list(assumptions(recipe, corpus, hardware, per_node, planner.decoding)),
        notes=notes,
    )


def planner_for(planner: Planner, recipe: Recipe, world: int, per_node: int) -> Planner:
    """The planner on so many GPUs, with this recipe's batch."""
    there = planner.on(max(world // per_node, 1), min(world, per_node))
    there.recipe = planner.recipe.model_copy(update={"data": recipe.data})
    return there


def foretell(planner: Planner, load: Load, before: Sequence[World], even: Load | None = None) -> World:
    """A step.

    Args:
        before: the smaller worlds of the same curve.
        even: how the clips fall on the ranks of the first world.
    """
    found, slow = predict_epoch(planner, load), predict_epoch(slower(planner), load)
    like = found if even is load else even and predict_epoch(planner, even)
    first = before[0] if before else None
    batch, world = planner.recipe.data.batch, planner.world

    def efficiency(prediction: Prediction) -> float:
        if first is None:
            return 1.0
        return batch / world / prediction.seconds["step"] / (first.batch / first.gpus / first.step_seconds)

    step = found.seconds["step"]
    return World(
        gpus=world,
        nodes=planner.nodes,
        batch=batch,
        clips=batch / world,
        micro_steps=found.micro_steps,
        step_seconds=step,
        seconds={part: value for part, value in found.seconds.items() if part != "step"},
        clips_per_second=batch / step,
        efficiency=efficiency(found),
        slow_efficiency=efficiency(slow) if first else step / slow.seconds["step"],
        even_efficiency=None if like is None else efficiency(like),
        exchange_share=found.seconds["exchange"] / step,
        wire_bytes=found.wire_bytes,
        link_bytes=found.link_bytes,
        device_bytes=found.device_bytes,
        fits=found.device_bytes <= planner.hardware.memory,
    )


def slower(planner: Planner) -> Planner:
    """The same in the pessimistic case; traces are shared."""
    other, hardware = copy(planner), planner.hardware
    other.hardware = hardware.model_copy(
        update={
            "link": hardware.link / SLOWER,
            "network": hardware.network / SLOWER,
            "collective_seconds": hardware.collective_seconds * LATER,
        }
    )
    return other


def assumptions(recipe: Recipe, corpus: Corpus, hardware: Hardware, per_node: int, decoding: float) -> Iterable[str]:
    """What the curve rests on, in words."""
    reached, moved = hardware.matrix_efficiency, hardware.bandwidth_efficiency
    yield (
        f"Lengths of clips: {corpus.source}. A step takes as long as its slowest rank's; of an epoch's steps the "
        "one in the middle is taken."
    )
    yield (
        f"{hardware.name}: {hardware.flops_16bit / 1e12:.0f} TFLOP/s in 16 bits, {hardware.flops_32bit / 1e12:.1f} in "
        f"fp32, {reached:.0%} of it reached; {hardware.bandwidth / 1e12:.2f} TB/s of memory, {moved:.0%} reached; at "
        f"least {hardware.launch_seconds * 1e6:g} µs per operation. Each operation takes the longest of the three."
    )
    yield (
        f"Exchange: a ring over all GPUs, {per_node} per node; {hardware.link / 1e9:.0f} GB/s per GPU inside a node, "
        f"{hardware.network / 1e9:.0f} GB/s per node between nodes, one direction, {hardware.link_efficiency:.0%} "
        "reached; the slower of both decides. No congestion by other jobs."
    )
    yield (
        f"Latency: {hardware.collective_seconds * 1e6:g} µs per collective in every world. Real latency grows with the "
        f"number of nodes; what {LATER} times the latency and {SLOWER} times slower links would cost is shown beside."
    )
    if recipe.zero.stage == 3:
        yield (
            "Overlap: under ZeRO-3 the next weights are gathered while the present ones are used: a step takes the "
            f"longest of computation, exchange and DeepSpeed's hooks ({hardware.zero3_seconds * 1e6:g} µs per module)."
        )
    else:
        yield "Overlap: none. Gradients are exchanged when they are ready, and computation waits for it."
    if recipe.simulation.decodes:
        yield f"Decoding: in {decoding:.0%} of the steps, the same ones on all ranks."
    yield "Not in the model: loading of clips, validation, checkpoints, jitter of the system, failures."


def remarks(recipe: Recipe, weak: Sequence[World], strong: Sequence[World], load: Load, largest: int) -> Iterable[str]:
    """Where scaling ends, and why; `load`: of the largest world under weak scaling."""
    batch, last, end = recipe.data.batch, weak[-1], strong[-1]
    most = batch // recipe.training.accumulation
    if largest > most:
        beyond = f"{largest} GPUs would have {batch / largest:.2f} clips each"
        yield f"Strong scaling ends at {end.gpus} GPUs: a batch of {batch} feeds at most {most}; {beyond}."
    poor = next((world for world in strong if world.efficiency < POOR), None)
    if poor is not None:
        yield (
            f"Strong: {poor.clips:.1f} clips per GPU on {poor.gpus} GPUs reach {poor.efficiency:.0%}. What a rank does "
            "for its longest clip does not shrink with the number of its clips; exchange is "
            f"{poor.exchange_share:.1%} of the step."
        )
    if last.efficiency < POOR and last.even_efficiency is not None:
        budget = "" if recipe.data.budget else "; data.budget, which is not set, levels the ranks"
        yield (
            f"Weak: {last.efficiency:.0%} on {last.gpus} GPUs, {last.even_efficiency:.0%} if all ranks had like clips: "
            f"the rest is waiting for the rank with the longest clips{budget}."
        )
    yield (
        f"Weak: the batch grows to {last.batch} clips, {load.steps} steps per epoch of {load.clips} clips. How well "
        "such batches train is not a question of speed and not answered here."
    )
    if load.steps < FEW:
        yield f"Weak: {load.steps} steps per epoch are few draws of the slowest rank; the last points are rough."
    for world in (*weak, *strong):
        if not world.fits:
            yield f"{world.gpus} GPUs, batch {world.batch}: {world.device_bytes / GIB:.0f} GiB do not fit."
