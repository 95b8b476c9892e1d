"""When ZeRO-3 gathers and drops weights: DeepSpeed's partitioned_param_coordinator, as arithmetic over a trace."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import Literal, Protocol

from sharding.plan_ledger import Ledger, Weight, Wire
from sharding.plan_trace import Trace

Foresight = Literal["all", "forward", "none"]
PREFETCH = 50_000_000  # elements
LIVE = 1_000_000_000  # elements gathered at most by prefetching
REUSE = 1_000_000_000  # elements within which a weight used again is kept


class Books(Protocol):
    """Where memory and bytes on the wire are written down."""

    memory: Ledger
    wire: Wire
    times: float


class Group:
    """Weights gathered by one call: they come in one flat buffer and are copied out of it when the first is needed."""

    def __init__(self, members: list[int], flat: int) -> None:
        self.waiting, self.members, self.flat, self.copied = set(members), members, flat, len(members) == 1


class Gathering:
    """Follows a step module by module.

    Args:
        weights: of the model.
        small: weights that are always there.
        world: ranks.
        trace: of a micro-step: the order in which modules will run.
        books: of the rank.
        foresight: what of a micro-step's order DeepSpeed knows. `all`: weights are sent for in advance, and kept for
            the backward pass if it comes soon. `forward`: it does not keep them (once it has seen a forward pass
            alone, as exact accumulation makes them, it goes on dropping what that pass would drop). `none`, because
            the order changes (decoding): nothing is sent for in advance or kept, and even small weights are dropped
            when their module ends.
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        small: set[int],
        world: int,
        trace: Trace,
        books: Books,
        foresight: Foresight,
    ) -> None:
        self.weights, self.world, self.books, self.foresight = weights, world, books, foresight
        always = set[int]() if foresight == "none" else small
        self.users = [sorted(module - always) for module in trace.modules]
        self.order: list[int] = []
        forward = 0
        for event in trace.events:
            if event.kind == "enter":
                self.order.append(event.index)
            elif event.kind == "phase" and event.part == "backward":
                forward = len(self.order)
        self.forward = forward if foresight == "forward" else 0  # modules of the forward pass, if it is known alone
        self.uses = [(index, place) for place, module in enumerate(self.order) for index in self.users[module]]
        self.there: dict[int, int] = {}  # bytes held for a gathered weight
        self.coming: dict[int, Group] = {}
        self.active: dict[int, Counter[int]] = {}
        self.begin()

    def begin(self) -> None:
        """A micro-step begins."""
        for index in list(self.coming):
            self.wait(index)
            self.drop(index)
        self.queue, self.place, self.live = deque(self.uses), 0, 0
        self.foreseen: dict[int, int] = {}

    def finish(self) -> None:
        """The step's backward pass has ended: everything is dropped."""
        for index in list(self.coming):
            self.wait(index)
        for index in list(self.there):
            self.drop(index)

    def gather(self, indices: list[int]) -> None:
        """Starts to gather weights in one call."""
        if not indices:
            return
        flat = sum(-(-self.weights[i].elements // self.world) * self.world * self.weights[i].size for i in indices)
        self.hold(flat)
        if self.world > 1:
            self.books.wire.send("all_gather", flat, self.books.times)
        self.coming.update(dict.fromkeys(indices, Group(indices, flat)))
        self.live += sum(self.weights[index].elements for index in indices)

    def hold(self, size: int) -> None:
        """Whole weights in memory; a single rank needs no copy of its own."""
        if self.world > 1:
            self.books.memory.hold("gathered weights", size)

    def wait(self, index: int) -> None:
        """The weight is needed now."""
        group = self.coming.pop(index)
        if not group.copied:
            self.hold(sum(self.weights[member].bytes for member in group.members))
            group.copied = True
        alone = len(group.members) == 1
        self.there[index] = group.flat if alone else self.weights[index].bytes
        group.waiting.discard(index)
        if not group.waiting and not alone:
            self.hold(-group.flat)

    def drop(self, index: int) -> None:
        """The weight is there in parts only."""
        self.hold(-self.there.pop(index))
        self.live -= self.weights[index].elements

    def fetch(self, module: int) -> None:
        """A module begins: its weights must be there, those of the next ones are sent for."""
        needed = self.users[module]
        self.gather([index for index in needed if index not in self.there and index not in self.coming])
        for index in needed:
            self.active.setdefault(index, Counter())[module] += 1
            if index in self.coming:
                self.wait(index)
        if self.foresight != "none":
            fresh = [index for index in needed if self.foreseen.get(index, -1) < self.place]
            for _ in range(min(len(fresh), len(self.queue))):
                index, used = self.queue.popleft()
                self.foreseen[index] = used
            self.prefetch()
        self.place += 1

    def prefetch(self) -> None:
        """Sends for weights in the order of their use."""
        limit, elements, wanted = min(LIVE - self.live, PREFETCH), 0, set[int]()
        while self.queue and elements < limit:
            index, used = self.queue.popleft()
            self.foreseen[index] = max(self.foreseen.get(index, -1), used)
            if index not in self.there and index not in self.coming and index not in wanted:
                wanted.add(index)
                elements += self.weights[index].elements
        self.gather(sorted(wanted))

    def release(self, module: int) -> None:
        """A module has ended: its weights are dropped unless they are used again soon."""
        passing = self.place <= self.forward
        later = self.order[self.place : self.forward if passing else len(self.order)]
        candidates = {index for index in self.users[module] if index in self.there}
        if not passing:
            candidates = {index for index in candidates if self.foreseen.get(index, -1) <= self.place}
        passed = 0
        for other in later if self.foresight != "none" else ():
            if passed >= REUSE or not candidates:
                break
            for index in self.users[other]:
                candidates.discard(index)
                passed += self.weights[index].elements
        for index in self.users[module]:
            self.active.get(index, Counter()).pop(module, None)
            if index in candidates and not self.active.get(index):
                self.drop(index)
