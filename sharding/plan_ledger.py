"""The terms in which a rank's memory and exchange are accounted for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Weight:
    """A parameter: its elements, bytes per element, and whether it is trained."""

    elements: int
    size: int
    trained: bool

    @property
    def bytes(self) -> int:
        """Of all its elements."""
        return self.elements * self.size


@dataclass(frozen=True)
class Optimizer:
    """What the optimizer holds per trained element.

    Args:
        state: bytes of moments per element.
        scratch: bytes per element of what it updates at once, while it updates.
        at_once: whether it updates all its tensors together (CUDA's multi-tensor kernels) or one after the other.
    """

    state: float
    scratch: float
    at_once: bool


@dataclass(frozen=True)
class Schedule:
    """An optimizer step.

    Args:
        micro_steps: forward and backward passes.
        replays: every micro-step but one first runs forward without a graph (exact accumulation).
        varies: the order of modules changes from step to step (decoding).
        inputs: bytes of the batches on the device.
        scales: bytes of the scales of quantised weights.
        exchanged: bytes of the rows that the loss gathers from all ranks.
        decoding: share of the steps that decode.
    """

    micro_steps: int = 1
    replays: bool = False
    varies: bool = False
    inputs: int = 0
    scales: int = 0
    exchanged: int = 0
    decoding: float = 1.0


@dataclass
class Ledger:
    """Bytes held, by name, and what they were when most was held."""

    held: Counter[str] = field(default_factory=Counter)
    total: int = 0
    peak: int = 0
    moment: str = ""
    at_peak: dict[str, int] = field(default_factory=dict)
    now: str = ""

    def hold(self, name: str, size: float) -> None:
        """Adds bytes; negative to release them."""
        self.held[name] += round(size)
        self.total += round(size)
        if self.total > self.peak:
            self.peak, self.moment, self.at_peak = self.total, self.now, dict(self.held)

    def touch(self, name: str, size: float) -> None:
        """Bytes held for a moment only."""
        self.hold(name, size)
        self.hold(name, -size)

    def drop(self, name: str) -> None:
        """Releases all of this name."""
        self.hold(name, -self.held[name])


@dataclass
class Wire:
    """Bytes given to each collective (whole tensors, whatever the algorithm makes of them), and the number of calls."""

    bytes: Counter[str] = field(default_factory=Counter)
    calls: float = 0

    def send(self, name: str, size: int, times: float = 1) -> None:
        """Adds a collective."""
        self.bytes[name] += round(size * times)
        self.calls += times


@dataclass
class Replay:
    """An optimizer step of one rank: memory of its device, memory of its host for offloaded state, exchange."""

    memory: Ledger
    host: Ledger
    wire: Wire
