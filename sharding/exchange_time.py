"""How long a rank stands in collectives, and how much of that is waiting for ranks that come later."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from sharding.clock import between, now
from sharding.collectives import device

# Methods of torch's process group that exchange; every caller (torch.distributed, DeepSpeed) comes through them. Which
# there are hangs on torch's version.
STARTS = (
    *("allreduce", "allreduce_coalesced", "reduce", "broadcast", "gather", "scatter", "barrier", "_end_coalescing"),
    *("allgather", "_allgather_base", "allgather_coalesced", "allgather_into_tensor_coalesced", "all_gather_single"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced", "reduce_scatter_single"),
    *("alltoall", "alltoall_base", "all_to_all_single"),
)
WINDOW = 20  # steps over which waiting is told from transfer


class ExchangeTimer:
    """While entered, times what collectives hold this process up: the call that starts one, and the wait for its end.
    What goes on behind computation in between is not held up, and not counted.

    On a GPU the times are between events in the stream that is current where the call is made, so the device is not
    made to wait. DeepSpeed gathers weights under ZeRO-3 in a stream of their own: there the times are the transfers',
    hidden behind computation or not.

    A call costs two readings of the clock (on a GPU: two events); outside of the block there is nothing.
    """

    def __init__(self) -> None:
        self._spans: list[tuple[Any, Any]] = []
        self._kept: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> ExchangeTimer:
        places = [*((dist.ProcessGroup, name) for name in STARTS), (dist.Work, "wait")]
        # As the class holds it: what getattr gives would not bind to an instance when it is put back.
        self._kept = [(owner, name, vars(owner)[name]) for owner, name in places if name in vars(owner)]
        for owner, name, _ in self._kept:
            setattr(owner, name, self._timed(getattr(owner, name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for owner, name, function in self._kept:
            setattr(owner, name, function)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = now()
            try:
                return function(*args, **kwargs)
            finally:
                self._spans.append((start, now()))

        return timed

    def read(self) -> list[float]:
        """Seconds of each call since the last reading, in their order."""
        if torch.cuda.is_available():
            for _, end in self._spans:
                end.synchronize()
        seconds = [between(start, end) for start, end in self._spans]
        self._spans = []
        return seconds


class Exchanged(NamedTuple):
    """Seconds per step: of this rank in collectives, and of these, with all ranks there."""

    steps: int
    seconds: float
    transfer_seconds: float


class Waits:
    """Tells waiting from transfer over some steps. Who comes last to a collective does not wait, so the shortest time
    that any rank spends in it is taken for the transfer, the rest of the others' for waiting (as DeepSpeed's
    `log_summary(show_straggler=True)` does). That costs two small exchanges once, between two steps.

    Args:
        steps: after which it tells.
    """

    def __init__(self, steps: int = WINDOW) -> None:
        self.left = steps
        self.calls: list[list[float]] = []

    def add(self, seconds: list[float]) -> Exchanged | None:
        """A step's collectives, as `ExchangeTimer.read` has them; with the last of these steps, what was found
        (collective).
        """
        if self.left == 0:
            return None
        self.calls.append(seconds)
        self.left -= 1
        return self.tell() if self.left == 0 else None

    def tell(self) -> Exchanged | None:
        """What the steps so far show, and then no more is taken (collective). None without steps, or where ranks made
        different numbers of calls.
        """
        self.left, calls, self.calls = 0, self.calls, []
        count = len(calls)
        own = torch.tensor([span for step in calls for span in step], dtype=torch.float64, device=device())
        sizes = torch.tensor([len(own), -len(own)], device=device())
        dist.all_reduce(sizes, op=dist.ReduceOp.MAX)
        if sizes.sum() != 0 or len(own) == 0:
            return None
        shortest = own.clone()
        dist.all_reduce(shortest, op=dist.ReduceOp.MIN)
        return Exchanged(count, float(own.sum()) / count, float(shortest.sum()) / count)
