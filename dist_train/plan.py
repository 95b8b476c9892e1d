"""Foretells a run before anything is allocated: memory, exchange, arithmetic, time; and which settings fit.

A micro-step of the recipe's own model is traced on tensors without data (sharding.plan_trace); what ZeRO makes of it,
and how long it takes on stated hardware, is arithmetic (sharding.plan_zero, sharding.hardware).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from dist_train.plan_corpus import Corpus, Load
from dist_train.plan_model import Clip, build_hollow, hollow_batch, trace_step
from dist_train.plan_pretrained import stored_type, tokenizer_of, without_weights
from dist_train.plan_quantised import scale_bytes
from dist_train.recipe import Recipe
from sharding.errors import UserError
from sharding.hardware import GIB, Hardware, ring_bytes, wire_seconds, work_seconds
from sharding.plan_ledger import Optimizer, Replay, Schedule, Weight
from sharding.plan_run import Operations
from sharding.plan_trace import Trace, Tracer
from sharding.plan_zero import STAGES
from sharding.zero import ZeroSettings

FP32 = 4
ADAPTER = re.compile(r"lora_|vera_")  # parameters that no file of a pretrained model holds
PROCESS = 2.0 * GIB  # host memory of a rank that has imported torch and DeepSpeed and holds a CUDA context
WORKER = 0.5 * GIB  # of a data loading process
UPDATE_TRAFFIC = 28  # bytes per element that Adam reads and writes: weight, gradient, two moments, the copy in bf16


class Prediction(BaseModel):
    """One rank in one optimizer step, unless said otherwise. Bytes, seconds, FLOPs (2 per multiply-add)."""

    model_config = ConfigDict(extra="forbid")

    world: int = Field(description="Ranks.")
    zero_stage: int
    micro_steps: int
    clips: int = Field(description="Clips of the largest micro-batch.")
    peak_bytes: int = Field(description="Most that torch's tensors take on the device.")
    peak_parts: dict[str, int] = Field(description="What they are then.")
    peak_moment: str = Field(description="When: at rest, forward and backward, update.")
    device_bytes: int = Field(description="The peak with gaps, CUDA and NCCL.")
    host_bytes: int = Field(description="Offloaded state of a rank.")
    loading_bytes: int = Field(description="Host memory of a node while its ranks load the model.")
    wire_bytes: dict[str, int] = Field(description="Whole tensors given to each collective.")
    link_bytes: dict[str, float] = Field(description="Sent by a GPU inside its node (inside), by a node (between).")
    flops: dict[str, float] = Field(description="By phase: decode, forward (replays included), backward.")
    flops_of_parts: dict[str, float] = Field(description="By part of the model.")
    seconds: dict[str, float] = Field(description="Of a typical step: decode, compute, exchange, update, step.")
    epoch_seconds: float | None = Field(description="Of an epoch of training.")
    clips_per_second: float | None = Field(description="Of all ranks.")
    checkpoint_bytes: int = Field(description="Of one checkpoint.")
    parameters: dict[str, dict[str, int]] = Field(description="Per part of the model: all, and trained.")


class MicroStep(NamedTuple):
    """A traced micro-step: what it does; bytes of its batch and of the row that a clip exchanges; its clips, audio
    positions of the longest, and passages through the language model's layers (see Flows).
    """

    trace: Trace
    batch_bytes: int
    row_bytes: int
    clips: int
    longest: int
    passages: int


class Planner:
    """Foretells steps of one recipe on one kind of machine.

    Args:
        recipe: resolved (feature widths filled in); `pretrained` parts need only a configuration.
        tokenizer: of the run; None, to go without.
        hardware: profile.
        nodes, per_node: ranks.
    """

    def __init__(self, recipe: Recipe, tokenizer: Any, hardware: Hardware, nodes: int, per_node: int) -> None:
        self.given, self.hardware = recipe, hardware
        self.nodes, self.per_node, self.world = nodes, per_node, nodes * per_node
        tokenizer = tokenizer_of(recipe) if tokenizer is None else tokenizer
        self.recipe, self.notes = without_weights(recipe)
        self.model = build_hollow(self.recipe, tokenizer)
        self.scales = scale_bytes(self.model)
        self.weights = [Weight(p.numel(), p.element_size(), p.requires_grad) for p in self.model.parameters()]
        self.traces: dict[Any, MicroStep] = {}
        self.operations = Operations()

    @property
    def decoding(self) -> float:
        """Share of the steps that decode: kept answers are refreshed now and then."""
        simulation = self.recipe.simulation
        return 1 / simulation.refresh_epochs if simulation.rollout == "cached" else 1.0

    def on(self, nodes: int, per_node: int | None = None) -> Planner:
        """The same on another number of nodes, and of ranks of each."""
        other = copy.copy(self)
        other.nodes, other.per_node, other.traces = nodes, per_node or self.per_node, {}
        other.world = other.nodes * other.per_node
        return other

    def trace(self, clips: Sequence[Clip], rows: int, *, zero3: bool, real: int | None = None) -> MicroStep:
        """The micro-step of these clips; `rows` are gathered for the loss, of which `real` (default: all) are clips."""
        real = rows if real is None else min(real, rows)
        key = (tuple(clips), rows, real, zero3)
        if key not in self.traces:
            tracer = Tracer(cuda=self.hardware.kind == "cuda", zero3=zero3, operations=self.operations)
            batch = hollow_batch(self.recipe, self.model, clips, tracer)
            trace, row_bytes, passages = trace_step(self.recipe, self.model, batch, tracer, rows=rows, real=real)
            held = [value for name, value in batch.items() if isinstance(value, Tensor) and "answer" not in name]
            size = sum(x.numel() * x.element_size() for x in held)
            self.traces[key] = MicroStep(trace, size, row_bytes, len(clips), batch["audio"].shape[1], passages)
        return self.traces[key]

    def predict(
        self,
        micro_batches: Sequence[Sequence[Clip]],
        *,
        zero: ZeroSettings | None = None,
        typical: Sequence[Sequence[Clip]] | None = None,
        load: Load | None = None,
        rank: int | None = None,
        gathered: int | None = None,
        of: int | None = None,
    ) -> Prediction:
        """Foretells a step.

        Args:
            micro_batches: clips of a rank's micro-batches in the order of the data; they decide memory and exchange.
            zero: settings other than the recipe's.
            typical: micro-batches that decide time; default: the same.
            load: of an epoch, for its duration.
            rank: whose memory; default: the last, which holds most.
            gathered: rows, padding included, that each rank gives to the exchanges of the loss; default: its clips.
            of: clips of the step over all ranks; default: as many as rows.
        """
        recipe, zero = self.recipe, zero or self.recipe.zero
        steps = len(micro_batches)
        exact = recipe.training.accumulated_loss == "exact"
        rows = self.world * max(map(len, micro_batches)) * (steps if exact else 1)
        if exact and gathered:
            rows = self.world * gathered
        zero3 = zero.stage == 3
        # Exact accumulation runs the last micro-batch first, approximate accumulation takes them as they come.
        ordered = list(reversed(micro_batches)) if exact else list(micro_batches)
        traced = [self.trace(clips, rows, zero3=zero3, real=of) for clips in ordered]
        schedule = Schedule(
            micro_steps=steps,
            replays=exact and steps > 1,
            varies=recipe.simulation.decodes,
            inputs=(sum if exact else max)(one.batch_bytes for one in traced),
            scales=self.scales,
            exchanged=self.world * traced[0].row_bytes * (gathered or sum(one.clips for one in traced)),
            decoding=self.decoding,
        )
        rank = self.world - 1 if rank is None else rank
        stage = STAGES[zero.stage](self.weights, zero, self.world, rank, optimizer_of(recipe, self.hardware))
        replay = stage.run([one.trace for one in traced], schedule)
        timed = traced
        if typical is not None:
            timed = [self.trace(clips, rows, zero3=zero3, real=of) for clips in reversed(typical)]
        traces = [one.trace for one in timed]
        seconds = self.seconds(traces, replay, zero, exact=exact)
        return self.summary(replay, zero, micro_batches, traces, seconds, load, exact=exact)

    def seconds(self, traces: Sequence[Trace], replay: Replay, zero: ZeroSettings, *, exact: bool) -> dict[str, float]:
        """Where the time of a step goes."""
        hardware = self.hardware
        phases = {"decode": 0.0, "forward": 0.0, "backward": 0.0}
        for number, trace in enumerate(traces):
            for phase in phases:
                times = 2 if phase == "forward" and exact and number > 0 else 1
                phases[phase] += times * work_seconds((one for one in trace.work if one.phase == phase), hardware)
        phases["decode"] *= self.decoding
        compute = phases["forward"] + phases["backward"]
        exchange = wire_seconds(replay.wire.bytes, replay.wire.calls, hardware, self.nodes, self.per_node)
        trained = sum(weight.elements for weight in self.weights if weight.trained)
        own = trained / (self.world if zero.stage else 1)
        update = own * UPDATE_TRAFFIC / (hardware.bandwidth * hardware.bandwidth_efficiency)
        if zero.offload_optimizer != "none":
            size = next(weight.size for weight in self.weights if weight.trained)
            update = own * (UPDATE_TRAFFIC / hardware.host_bandwidth + 2 * size / hardware.host_link)
        busy = compute + phases["decode"]
        if zero.stage == 3:  # gathers the next weights while the present ones are used; its hooks run on the host
            hooks = sum(trace.visits(self.decoding) for trace in traces) * hardware.zero3_seconds
            busy = max(busy, exchange, hooks)
        else:
            busy += exchange
        return {
            "decode": phases["decode"],
            "compute": compute,
            "exchange": exchange,
            "update": update,
            "step": busy + update,
        }

    def summary(
        self,
        replay: Replay,
        zero: ZeroSettings,
        micro_batches: Sequence[Sequence[Clip]],
        traces: Sequence[Trace],
        seconds: dict[str, float],
        load: Load | None,
        *,
        exact: bool,
    ) -> Prediction:
        """All of it in one record."""
        memory, hardware = replay.memory, self.hardware
        rings = ring_bytes(replay.wire.bytes, self.nodes, self.per_node).values()
        flops: dict[str, float] = {}
        parts: dict[str, float] = {}
        for number, trace in enumerate(traces):
            for one in trace.work:
                times = one.times * (2 if one.phase == "forward" and exact and number > 0 else 1)
                done = one.flops * times * (self.decoding if one.phase == "decode" else 1)
                flops[one.phase] = flops.get(one.phase, 0.0) + done
                parts[one.part] = parts.get(one.part, 0.0) + done
        trained = sum(weight.elements for weight in self.weights if weight.trained)
        epoch = None if load is None else seconds["step"] * load.steps
        parameters: dict[str, dict[str, int]] = {}
        for (name, _), weight in zip(self.model.named_parameters(), self.weights, strict=True):
            part = parameters.setdefault(name.split(".")[0], {"all": 0, "trained": 0})
            part["all"] += weight.elements
            part["trained"] += weight.elements * weight.trained
        return Prediction(
            world=self.world,
            zero_stage=zero.stage,
            micro_steps=len(micro_batches),
            clips=max(map(len, micro_batches)),
            peak_bytes=memory.peak,
            peak_parts={name: size for name, size in memory.at_peak.items() if size > 0},
            peak_moment=memory.moment,
            device_bytes=round(memory.peak * (1 + hardware.fragmentation) + hardware.reserved),
            host_bytes=replay.host.peak,
            loading_bytes=self.loading_bytes(),
            wire_bytes=dict(replay.wire.bytes),
            link_bytes={
                "inside": sum(ring.inside for ring in rings),
                "between": sum(ring.between for ring in rings),
            },
            flops=flops,
            flops_of_parts=parts,
            seconds=seconds,
            epoch_seconds=epoch,
            clips_per_second=None if load is None or epoch is None else load.clips / epoch,
            checkpoint_bytes=trained * 3 * FP32,
            parameters=parameters,
        )

    def loading_bytes(self) -> int:
        """Host memory of a node while its ranks load. Files that hold the recipe's type are mapped, once for all ranks;
        of another type, or quantised, each rank makes its own copy, weight by weight. What is random starts in fp32.
        """
        given = {"audio": self.given.audio.pretrained, "llm": self.given.text.pretrained}
        mapped = {part for part, name in given.items() if name and stored_type(name) in (None, self.recipe.dtype)}
        shared, own, largest = 0, 0, 0
        for name, parameter in self.model.named_parameters():
            part, count, size = name.split(".")[0], parameter.numel(), parameter.element_size()
            read = given.get(part) is not None and not ADAPTER.search(name)
            if read and part in mapped and parameter.is_floating_point():
                shared += count * size
            else:
                own += count * (size if read else max(FP32, size))
            largest = max(largest, count * FP32)
        workers = self.recipe.data.workers * WORKER
        return round(shared + self.per_node * (own + largest + PROCESS + workers))


def optimizer_of(recipe: Recipe, hardware: Hardware) -> Optimizer:
    """What the recipe's optimizer holds (torch/optim/adam.py; bitsandbytes' blocks of 256 codes with one scale)."""
    if recipe.optimizer.name == "adamw_8bit":
        return Optimizer(state=2 * (1 + FP32 / 256), scratch=0, at_once=False)
    if hardware.kind == "cuda":  # several tensors at once: a root of the second moment
        return Optimizer(state=2 * FP32, scratch=FP32, at_once=True)
    coupled = recipe.optimizer.name == "adam" and recipe.optimizer.weight_decay > 0  # the gradient with decay
    return Optimizer(state=2 * FP32, scratch=(3 if coupled else 2) * FP32, at_once=False)


class Candidate(BaseModel):
    """Other settings of the same recipe."""

    model_config = ConfigDict(extra="forbid")

    zero_stage: int
    micro_steps: int
    clips: int = Field(description="Clips of the largest micro-batch.")
    device_bytes: int
    step_seconds: float
    fits: bool
    verdict: str = Field(description="Why it is, or is not, the best.")


class Scale(BaseModel):
    """The same global batch on more ranks."""

    model_config = ConfigDict(extra="forbid")

    world: int
    clips: float = Field(description="Clips per rank and optimizer step.")
    step_seconds: float
    efficiency: float = Field(description="Of perfect scaling from the first entry.")


class Measured(BaseModel):
    """One rank in one optimizer step of a run, beside what the planner foretells for the clips of that step."""

    model_config = ConfigDict(extra="forbid")

    step: int = Field(description="Optimizer step that was measured.")
    peak_bytes: int = Field(description="Most that torch's tensors took on the device of rank 0.")
    foretold_peak_bytes: int
    foretold_peak_parts: dict[str, int]
    wire_bytes: dict[str, int] = Field(description="Whole tensors that rank 0 gave to each collective.")
    foretold_wire_bytes: dict[str, int]
    step_seconds: float | None = Field(None, description="Mean over the run; null while it goes on.")
    mfu: float | None = Field(None, description="Model FLOPs utilisation over the run.")
    exchange_steps: int | None = Field(
        None, description="Steps after the measured one over which the next two are means."
    )
    exchange_seconds: float | None = Field(None, description="Of rank 0 in collectives, per step.")
    transfer_seconds: float | None = Field(None, description="Of these with all ranks there: the rest was waiting.")


class Plan(BaseModel):
    """What `dist-train plan` tells, and what stands in plan.json of a run."""

    model_config = ConfigDict(extra="forbid")

    hardware: Hardware
    nodes: int
    per_node: int
    corpus: str = Field(description="Whose lengths were taken.")
    predicted: Prediction = Field(description="The recipe as it is.")
    candidates: list[Candidate] = Field(default_factory=list)
    best: int | None = Field(None, description="Index of the best candidate; none fits: null.")
    scaling: list[Scale] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    measured: Measured | None = Field(None, description="What a run took.")

    def write(self, path: Path) -> None:
        """As JSON, whole or not at all.

        Raises:
            UserError: the place cannot be written to.
        """
        temporary = path.with_name(path.name + ".new")
        try:
            temporary.write_text(self.model_dump_json(indent=1), encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            raise UserError(
                str(path), f"cannot be written ({error.strerror})", "Name a file in a directory you may write to."
            ) from None


def plan_as_is(planner: Planner, corpus: Corpus, load: Load) -> Plan:
    """The plan of the recipe as it is, without alternatives."""
    return Plan(
        hardware=planner.hardware,
        nodes=planner.nodes,
        per_node=planner.per_node,
        corpus=corpus.source,
        predicted=predict_epoch(planner, load),
        notes=planner.notes,
    )


def predict_epoch(planner: Planner, load: Load, zero: ZeroSettings | None = None) -> Prediction:
    """Memory of the micro-batch that takes most, and time of a typical step: that of the rank with most to compute, or
    of the one that decodes the longest answer, token by token, if that takes longer.
    """
    worst = [load.worst] * len(load.typical)
    slow = [load.typical]
    if planner.recipe.simulation.decodes and load.longest != load.typical:
        slow.append(load.longest)
    batch = planner.recipe.data.batch
    return max(
        (planner.predict(worst, zero=zero, typical=one, load=load, gathered=load.gathered, of=batch) for one in slow),
        key=lambda prediction: prediction.seconds["step"],
    )


def here() -> str:
    """Name of the profile that is nearest to this machine."""
    if not torch.cuda.is_available():
        return "cpu"
    name = torch.cuda.get_device_name().lower()
    return next((profile for profile in ("h200", "h100", "a100") if profile in name), "h100")
