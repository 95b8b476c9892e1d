"""All ranks report to rank 0, which decides and answers all. Nothing here waits without end.

It uses the store of the process group, over a connection of its own: the ranks' usual exchange is what may hang, and a
store whose process is stopped never answers either, so that each turn has a thread and a time limit.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

ARRIVAL = 120.0  # seconds within which all ranks begin: they may have imported from a slow disk before
PAUSE = 0.005  # between two looks at who has reported; a wait that is given up would print warnings of torch's
SLICES = 10  # of a waiting time
GRACE = 5.0  # seconds that a rank may be late, beside its work
_runs = itertools.count()  # keys of a run must not be those of another in the same job


class RankZeroSilent(Exception):
    """Rank 0 did not answer."""


class Skew(NamedTuple):
    """Seconds by which a rank's clock is ahead of rank 0's: `ahead` ± `within`."""

    ahead: float
    within: float


class Exchange:
    """The turns of a run; every rank makes the same ones.

    Attributes:
        silent: ranks that did not report in time; they are not waited for again. The same on all that heard of it.
    """

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.silent: list[int] = []
        self._turns = itertools.count()
        self._last = time.monotonic()
        self._least = [float("-inf")] * self.world  # bounds of the clocks' difference, see `skew`
        self._most = [float("inf")] * self.world
        self._behind = float("inf")
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives a restart
        self._prefix = f"preflight/{attempt}/{next(_runs)}"
        try:
            self._store = within(ARRIVAL, self._connect)
        except (TimeoutError, RuntimeError) as error:  # torch's errors of stores are RuntimeErrors
            raise RankZeroSilent from error

    def _connect(self) -> dist.Store:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False
        )
        return dist.PrefixStore(self._prefix, store)

    def report(self, value: Any, decide: Callable[[dict[int, Any]], Any], work: float) -> Any:
        """One turn: every rank reports, rank 0 decides, all get its answer (collective).

        Args:
            value: JSON-able.
            decide: called in rank 0 with what the ranks reported, by rank; silent ones are missing. JSON-able result.
            work: seconds a rank may have worked since the last turn.

        Raises:
            RankZeroSilent: on other ranks.
        """
        turn = next(self._turns)
        limit = self._last + work + GRACE - time.monotonic()
        if self.rank == 0:
            answer = self._collect(turn, value, decide, max(limit, GRACE))
        else:
            limit = max(limit, GRACE) + 2 * GRACE  # rank 0 may wait for others, and then has to decide
            try:
                answer = within(limit, lambda: self._tell(turn, value, limit))
            except (TimeoutError, RuntimeError) as error:
                raise RankZeroSilent from error
        self._last = time.monotonic()
        return answer

    def _tell(self, turn: int, value: Any, limit: float) -> Any:
        store = self._store
        store.set(f"{turn}/{self.rank}", json.dumps([time.time(), self._behind, value]))
        store.wait([f"{turn}/answer"], timedelta(seconds=limit))
        answered, silent, answer = json.loads(store.get(f"{turn}/answer"))
        self._behind = min(self._behind, time.time() - answered)
        self.silent = silent
        return answer

    def _collect(self, turn: int, value: Any, decide: Callable[[dict[int, Any]], Any], limit: float) -> Any:
        store = self._store
        came = self._wait_for(turn, limit)
        self.silent = [rank for rank in range(1, self.world) if rank not in came]
        values = store.multi_get(list(came.values())) if came else []
        now = time.time()
        reports = {0: value}
        for rank, text in zip(came, values, strict=True):
            sent, behind, reports[rank] = json.loads(text)
            self._least[rank] = max(self._least[rank], sent - now)
            self._most[rank] = min(self._most[rank], behind)
        decided = decide(reports)
        answer = json.dumps([time.time(), self.silent, decided])
        store.set(f"{turn}/answer", answer)
        return json.loads(answer)[2]  # as the others get it: lists for tuples, text for keys

    def _wait_for(self, turn: int | str, limit: float) -> dict[int, str]:
        """Keys of the ranks that write theirs in time."""
        keys = {rank: f"{turn}/{rank}" for rank in range(1, self.world) if rank not in self.silent}
        ends = time.monotonic() + limit
        while not self._store.check(list(keys.values())):
            if time.monotonic() > ends:
                return {rank: key for rank, key in keys.items() if self._store.check([key])}
            time.sleep(PAUSE)
        return keys

    def close(self) -> None:
        """Rank 0, in which the store may live, leaves after the others have its last answer (collective)."""
        if self.rank == 0:
            self._wait_for("end", GRACE)
        else:
            with suppress(TimeoutError, RuntimeError):
                within(GRACE, lambda: self._store.set(f"end/{self.rank}", ""))

    def skew(self) -> dict[int, Skew]:
        """How far the clocks of the ranks are from rank 0's (in rank 0), after some turns.

        A message cannot arrive before it was sent. So a rank's clock is ahead at least by the time it wrote on a report
        less the time at which rank 0 had read it, and at most by the time at which it had read an answer less the
        time rank 0 wrote on it.
        """
        pairs = zip(self._least, self._most, strict=True)
        between = {rank: Skew((least + most) / 2, (most - least) / 2) for rank, (least, most) in enumerate(pairs)}
        heard = {rank: skew for rank, skew in between.items() if rank and skew.within < float("inf")}
        return {0: Skew(0.0, 0.0), **heard}


def within(seconds: float, action: Callable[[], T]) -> T:
    """Runs `action` in a thread of its own on this rank's GPU, and waits so long for it.

    Raises:
        TimeoutError: it is not done. The thread goes on: what it waits for may never come.
    """
    done: Future[T] = Future()
    gpu = torch.cuda.current_device() if torch.cuda.is_available() else None

    def run() -> None:
        try:
            if gpu is not None:
                torch.cuda.set_device(gpu)  # a thread begins on the first one
            done.set_result(action())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="preflight", daemon=True).start()
    for _ in range(SLICES):  # the time during which this process was suspended itself counts as one
        with suppress(TimeoutError):
            done.exception(seconds / SLICES)
            break
    return done.result(0)
