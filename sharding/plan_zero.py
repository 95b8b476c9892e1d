"""What a rank holds and sends in one optimizer step under each stage of ZeRO, by arithmetic over traced micro-steps.

The rules are those of DeepSpeed 0.19 (runtime/engine.py, fp16/unfused_optimizer.py, zero/stage_1_and_2.py,
zero/stage3.py): which buffers it makes, how large, and when it drops them. ZeRO: arXiv 1910.02054.
"""

from __future__ import annotations

from collections.abc import Sequence

from sharding.plan_gather import Foresight, Gathering
from sharding.plan_ledger import Ledger, Optimizer, Replay, Schedule, Weight, Wire
from sharding.plan_trace import Trace
from sharding.zero import ZeroSettings

FP32, FP64 = 4, 8  # bytes
WHOLE_ALLREDUCE = 500_000_000  # elements that stage 0 reduces at once
SUB_GROUP = 1_000_000_000  # elements that stage 3 updates at once
ALIGNMENT = 2  # stages 1 and 2 pad the trained weights to a multiple of this times the ranks


class Zero:
    """Base of the stages, and stage 0: every rank holds everything.

    Args:
        weights: of the model, in the order of `model.parameters()`.
        settings: of ZeRO.
        world: ranks.
        rank: which of them; the last holds most, because gradients come from behind.
        optimizer: see Optimizer.
    """

    def __init__(
        self, weights: Sequence[Weight], settings: ZeroSettings, world: int, rank: int, optimizer: Optimizer
    ) -> None:
        self.weights, self.settings, self.world, self.rank = weights, settings, world, rank
        self.optimizer = optimizer
        self.trained = [index for index, weight in enumerate(weights) if weight.trained]
        self.size = weights[self.trained[0]].size  # of a trained element; all have the same
        self.elements = sum(weights[index].elements for index in self.trained)
        self.largest = max(weights[index].elements for index in self.trained)
        self.offloads = settings.offload_optimizer != "none" and settings.stage > 0
        self.memory, self.host, self.wire = Ledger(), Ledger(), Wire()
        self.micro, self.last = 0, True
        self.times = 1.0  # how often what is traced once is done in a step, on average

    def run(self, traces: Sequence[Trace], schedule: Schedule) -> Replay:
        """Replays an optimizer step.

        Args:
            traces: of its micro-steps in the order in which they run; fewer, if the others are like them.
        """
        self.memory.now = "at rest"
        self.memory.hold("inputs", schedule.inputs)
        self.memory.hold("frozen weights", schedule.scales)
        self.rest()
        self.foresee(traces[0], schedule)
        self.decoding = schedule.decoding
        self.memory.now = "forward and backward"
        for self.micro in range(schedule.micro_steps):
            trace = traces[self.micro % len(traces)]
            self.last = self.micro == schedule.micro_steps - 1
            if schedule.replays and not self.last:
                self.begin()
                self.follow(trace, {"forward"}, memory=False)
            self.begin()
            self.follow(trace, {"decode", "forward", "backward"}, memory=True)
            self.end()
        self.wire.send("all_gather", schedule.exchanged)
        self.memory.now = "update"
        self.step()
        return Replay(self.memory, self.host, self.wire)

    def follow(self, trace: Trace, phases: set[str], *, memory: bool) -> None:
        """Follows the events of these phases."""
        phase = "forward"
        for event in trace.events:
            if event.kind == "phase":
                phase = event.part
                self.times = self.decoding if phase == "decode" else 1.0
            elif event.kind == "memory":
                if memory:
                    self.memory.hold(f"activations of {event.part}", event.size)
            elif phase not in phases:
                continue
            elif event.kind == "gradient":
                self.gradient(event.index)
            elif event.kind == "enter":
                self.enter(event.index)
            elif event.kind == "leave":
                self.leave(event.index)
            else:
                self.times = event.size * (self.decoding if phase == "decode" else 1.0)
        if memory and not self.last:
            for name in [name for name in self.memory.held if name.startswith("activations")]:
                self.memory.drop(name)

    def foresee(self, trace: Trace, schedule: Schedule) -> None:
        """Before the first micro-step."""

    def rest(self) -> None:
        """What is held between steps."""
        self.memory.hold("frozen weights", sum(weight.bytes for weight in self.weights if not weight.trained))
        self.memory.hold("trained weights", self.elements * self.size)
        self.states(self.elements if self.size < FP32 else 0, self.elements)

    def states(self, masters: int, elements: int) -> None:
        """fp32 masters and moments of so many elements; offloaded, with their gradients and a copy for the way back."""
        ledger = self.host if self.offloads else self.memory
        ledger.hold("fp32 masters", FP32 * masters)
        ledger.hold("optimizer moments", self.optimizer.state * elements)
        if self.offloads:
            self.host.hold("gradients", FP32 * elements)
            self.host.hold("buffers", (elements + self.largest) * self.size)
            self.memory.hold("buckets", self.largest * self.size)

    def begin(self) -> None:
        """A micro-step begins."""

    def enter(self, module: int) -> None:
        """A module begins."""

    def leave(self, module: int) -> None:
        """A module ends."""

    def gradient(self, index: int) -> None:
        """The gradient of a parameter is complete."""
        if self.micro == 0:
            self.memory.hold("gradients", self.weights[index].bytes)

    def end(self) -> None:
        """A micro-step ends; in the last one gradients are exchanged."""
        if self.last:
            pending = 0
            for index in self.trained:
                pending += self.weights[index].elements
                if pending > WHOLE_ALLREDUCE or index == self.trained[-1]:
                    self.memory.touch("buckets", pending * self.size)
                    self.wire.send("all_reduce", pending * self.size)
                    pending = 0

    def step(self) -> None:
        """The update."""
        if self.size < FP32:
            self.memory.hold("gradients", FP32 * self.elements)
        self.update(self.elements, self.largest)

    def update(self, elements: int, largest: int) -> None:
        """The optimizer runs over `elements`, of which `largest` are in one tensor."""
        ledger = self.host if self.offloads else self.memory
        ledger.touch("optimizer scratch", self.optimizer.scratch * (elements if self.optimizer.at_once else largest))


class Partitioned(Zero):
    """Stages 1 and 2: each rank updates its part of one flat vector of all trained weights."""

    def __init__(
        self, weights: Sequence[Weight], settings: ZeroSettings, world: int, rank: int, optimizer: Optimizer
    ) -> None:
        super().__init__(weights, settings, world, rank, optimizer)
        unit = ALIGNMENT * world
        self.padded = -(-self.elements // unit) * unit
        self.partition = self.padded // world
        self.own = self.touched()
        self.kept = 0 if self.offloads else sum(weights[index].bytes for index in self.own)
        self.bucket = settings.bucket_elements
        self.filled, self.large = 0, 0  # elements in the bucket; bytes of a gradient too large for it
        self.queued: list[int] = []  # parameters in the bucket
        self.open = self.collected = False  # there is a bucket; there is memory for what this rank keeps

    def touched(self) -> set[int]:
        """The parameters that this rank's part touches."""
        begin, end = self.rank * self.partition, (self.rank + 1) * self.partition
        found, start = set(), 0
        for index in self.trained:
            stop = start + self.weights[index].elements
            if start < end and stop > begin:
                found.add(index)
            start = stop
        return found

    def rest(self) -> None:
        self.memory.hold("frozen weights", sum(weight.bytes for weight in self.weights if not weight.trained))
        self.memory.hold("trained weights", self.padded * self.size)
        self.states(self.partition, self.partition)  # a copy even of fp32 weights

    def open_bucket(self) -> None:
        """The bucket is made with the first gradient of a micro-step."""
        if not self.open:
            self.memory.hold("buckets", self.bucket * self.size)
            self.open, self.collected = True, False

    def close_bucket(self) -> None:
        """It is dropped when the micro-step's gradients are exchanged."""
        if self.open:
            self.memory.hold("buckets", -self.bucket * self.size)
        self.open = False

    def put(self, index: int, *, held: bool) -> None:
        """A gradient goes into the bucket.

        Args:
            held: its own memory is counted and is released now.
        """
        weight = self.weights[index]
        if self.filled + weight.elements > self.bucket:
            self.flush()
        if weight.elements > self.bucket:
            if not held:
                self.memory.hold("gradients", weight.bytes)
            self.large = weight.bytes
        elif held:
            self.memory.hold("gradients", -weight.bytes)
        self.filled += weight.elements
        self.queued.append(index)

    def flush(self) -> None:
        """The bucket is copied, reduced, and what this rank keeps is copied out."""
        if not self.filled:
            return
        self.memory.touch("buckets", self.filled * self.size)
        self.wire.send("all_reduce", self.filled * self.size)
        if not self.collected and self.own.intersection(self.queued):
            self.memory.hold("gradients", self.kept)
            self.collected = True
        self.memory.hold("gradients", -self.large)
        self.filled, self.large, self.queued = 0, 0, []

    def step(self) -> None:
        largest = max((min(self.weights[index].elements, self.partition) for index in self.own), default=0)
        self.memory.touch("buckets", FP64 * largest)  # the norm
        if not self.offloads:
            self.memory.hold("flat gradient", self.partition * self.size)
            if self.size < FP32:
                self.memory.hold("flat gradient", FP32 * self.partition)
                self.memory.hold("flat gradient", -self.partition * self.size)
        self.memory.drop("gradients")
        self.update(self.partition, self.partition)
        if self.world > 1:  # DeepSpeed leaves it out where one rank has everything
            self.wire.send("all_gather", self.padded * self.size)


class Stage1(Partitioned):
    """Gradients stay whole until the last micro-step has ended."""

    def gradient(self, index: int) -> None:
        self.open_bucket()
        super().gradient(index)

    def end(self) -> None:
        if self.last:
            for index in self.trained:
                self.put(index, held=True)
            self.flush()
            self.close_bucket()
            self.memory.hold("gradients", self.kept - self.memory.held["gradients"])


class Stage2(Partitioned):
    """Gradients are exchanged in each micro-step, bucket by bucket."""

    def gradient(self, index: int) -> None:
        self.open_bucket()
        self.put(index, held=False)

    def end(self) -> None:
        self.flush()
        self.close_bucket()
        if self.micro > 0:
            self.memory.hold("gradients", -self.kept)  # added to those of the micro-steps before


class Stage3(Zero):
    """Weights are in parts too, and gathered around the modules that use them."""

    gathering: Gathering

    def __init__(
        self, weights: Sequence[Weight], settings: ZeroSettings, world: int, rank: int, optimizer: Optimizer
    ) -> None:
        super().__init__(weights, settings, world, rank, optimizer)
        self.bucket = settings.bucket_elements
        self.filled: list[int] = []
        threshold = settings.persistence_threshold
        self.persistent = [index for index, weight in enumerate(weights) if weight.elements <= threshold]

    def part(self, index: int) -> int:
        """Elements of a parameter that a rank holds."""
        return -(-self.weights[index].elements // self.world)

    def rest(self) -> None:
        own = sum(self.part(index) for index in self.trained)
        frozen = sum(self.part(i) * weight.size for i, weight in enumerate(self.weights) if not weight.trained)
        weights = self.host if self.settings.offload_parameters != "none" else self.memory
        weights.hold("frozen weights", frozen)
        weights.hold("trained weights", own * self.size)
        self.memory.hold("gathered weights", sum(self.weights[index].bytes for index in self.persistent))
        self.states(own, own)
        if not self.offloads:
            self.memory.hold("gradients", own * self.size)
        self.memory.hold("buckets", self.bucket * self.size)

    def foresee(self, trace: Trace, schedule: Schedule) -> None:
        foresight: Foresight = "none" if schedule.varies else "forward" if schedule.replays else "all"
        self.gathering = Gathering(self.weights, set(self.persistent), self.world, trace, self, foresight)

    def begin(self) -> None:
        self.gathering.begin()

    def enter(self, module: int) -> None:
        self.gathering.fetch(module)

    def leave(self, module: int) -> None:
        self.gathering.release(module)

    def gradient(self, index: int) -> None:
        elements = sum(self.weights[i].elements for i in self.filled)
        if self.filled and elements + self.weights[index].elements > self.bucket:
            self.flush()
        if self.weights[index].elements > self.bucket:
            self.memory.hold("gradients", self.weights[index].bytes)
        self.filled.append(index)

    def flush(self) -> None:
        """The bucket's gradients are interleaved by rank, and scattered."""
        if not self.filled:
            return
        padded = sum(self.part(index) for index in self.filled) * self.world
        if len(self.filled) > 1 or padded != self.weights[self.filled[0]].elements:
            self.memory.touch("buckets", padded * self.size)
        self.wire.send("reduce_scatter", padded * self.size)
        large = sum(self.weights[i].bytes for i in self.filled if self.weights[i].elements > self.bucket)
        self.memory.hold("gradients", -large)
        self.filled = []

    def end(self) -> None:
        self.flush()

    def step(self) -> None:
        self.gathering.finish()
        self.memory.touch("buckets", FP64 * max(self.part(index) for index in self.trained))  # the norm
        for group in self.sub_groups():
            if not self.offloads:
                self.memory.hold("flat gradient", group * self.size)
                if self.size < FP32:
                    self.memory.hold("flat gradient", FP32 * group)
                    self.memory.hold("flat gradient", -group * self.size)
            self.update(group, group)
            self.memory.drop("flat gradient")
        padded = sum(self.part(index) * self.world * self.weights[index].size for index in self.persistent)
        self.memory.touch("gathered weights", padded)
        self.wire.send("all_gather", padded)

    def sub_groups(self) -> list[int]:
        """Elements that are updated at once."""
        groups, open_ = [], 0
        for index in self.trained:
            open_ += self.part(index)
            if open_ >= SUB_GROUP:
                groups.append(open_)
                open_ = 0
        return [*groups, open_] if open_ else groups


STAGES: dict[int, type[Zero]] = {0: Zero, 1: Stage1, 2: Stage2, 3: Stage3}
