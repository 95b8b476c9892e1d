"""Notices a run that stands still, names rank, phase and module, dumps the stacks of all ranks and ends the job.

The training calls :func:`sharding.heartbeat.beat` where a phase begins. A thread in every rank tells rank 0 how far its
training is, over a store of its own: the ranks' usual exchange is what may hang. Rank 0 judges, and its verdict ends
all ranks; if rank 0 itself falls silent, the others end by themselves. Time is counted in turns of the thread: a job
that is suspended as a whole and continued later did not stand still.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TextIO

import torch.distributed as dist
from torch import nn

from sharding.collectives import gather_objects, together
from sharding.errors import UserError
from sharding.heartbeat import listeners
from sharding.launch import HUNG, report_errors

VERDICT = "verdict"
LOADING = 3, 120.0  # it has no phases and waits for disks: times the limit, and at least so many seconds
EXCHANGES = "distributed_c10d.py", "exchange_time.py"  # the second: the wait for an exchange begun before
GRACE = 5.0  # seconds in which all ranks hear the verdict and write their stacks


@dataclass
class Place:
    """How far the training of a rank is.

    Args:
        count: beats in this step; the same beat has the same number on all ranks.
        phase: what it does.
        step: of how many steps made.
        waits: it is in an exchange with other ranks.
        module: the innermost part of the model it is in.
        idle: seconds without a beat.
        turn: of the thread; it stands where the process is stopped or dead.
        process: "host:pid".
    """

    count: int = 0
    phase: str = "loading"
    step: int = 0
    waits: bool = False
    module: str | None = None
    idle: float = 0.0
    turn: int = 0
    process: str = ""

    def limit(self, seconds: float) -> float:
        """How long the phase may take, in seconds, if others may take `seconds`."""
        return max(LOADING[0] * seconds, LOADING[1]) if self.phase == "loading" else seconds


class Watchdog:
    """Watches the main thread of this rank while entered (collective on entering).

    Args:
        logs: directory for rank_N.stacks.txt and heartbeat.json, which tells where every rank is.
        seconds: without a beat after which a rank stands still.
    """

    def __init__(self, logs: Path, seconds: float) -> None:
        self.logs, self.seconds = logs, seconds
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.interval = min(max(seconds / 20, 0.25), 5.0)
        self.place = Place(process=f"{platform.node()}:{os.getpid()}")
        self.modules: dict[int, str] = {}
        self._main = threading.get_ident()
        self._seen: dict[int, tuple[int, float]] = {}  # rank: its last turn, and seconds since it came
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._talk = ThreadPoolExecutor(1, "watchdog-store")  # a store whose process is stopped never answers

    def __enter__(self) -> Watchdog:
        if self.rank == 0:
            self.store = self._connect(0)
        port = gather_objects(self.store.port if self.rank == 0 else None)[0]
        if self.rank != 0:
            self.store = self._connect(port)
        self._tell()
        dist.barrier()  # everyone has told something
        self._stacks = together(self._open_stacks)
        # Data workers inherit it.
        faulthandler.register(signal.SIGUSR1, file=self._stacks, all_threads=True)
        listeners.append(self)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        listeners.remove(self)
        self._over.set()
        self._thread.join()
        self._talk.shutdown(wait=False)
        faulthandler.unregister(signal.SIGUSR1)
        self._stacks.close()
        with suppress(OSError):
            if not Path(self._stacks.name).stat().st_size:
                Path(self._stacks.name).unlink()
            if self.rank == 0:
                (self.logs / "heartbeat.json").unlink()
        if error is None:
            dist.barrier()  # the store lives in rank 0

    def _connect(self, port: int) -> dist.TCPStore:
        return dist.TCPStore(
            os.environ["MASTER_ADDR"],
            port,
            is_master=self.rank == 0,
            wait_for_workers=False,
        )

    def _open_stacks(self) -> TextIO:
        self.logs.mkdir(parents=True, exist_ok=True)  # a run that was moved may lack it
        return (self.logs / f"rank_{self.rank}.stacks.txt").open("w")

    def watch(self, model: nn.Module) -> None:
        """From now on modules of this model are named."""
        self.modules = {id(module): name for name, module in model.named_modules() if name}

    def beat(self, phase: str, step: int | None, waits: bool) -> None:
        """The training begins something."""
        place = self.place
        place.idle, place.phase, place.waits, place.count = 0.0, phase, waits, place.count + 1
        if step is not None:
            place.step, place.count = step, 0

    def _run(self) -> None:
        before = time.monotonic()
        unreachable = untold = 0.0
        turn: Future[bool] | None = None
        while not self._over.wait(self.interval):
            now = time.monotonic()
            passed, before = min(now - before, 3 * self.interval), now  # more: this process was suspended
            self.place.idle += passed
            untold += passed
            over = False
            try:
                if turn is None:
                    turn, untold = self._talk.submit(self._turn, untold), 0.0
                over = turn.result(self.interval)
                turn, unreachable = None, 0.0
            except (TimeoutError, RuntimeError) as error:  # rank 0, which holds the store, or the way to it is gone
                turn = turn if isinstance(error, TimeoutError) else None
                unreachable += passed
                if unreachable > self.place.limit(self.seconds):
                    over = True
                    report_errors([silent({0: unreachable}, None, self.logs)])
            if over and not self._over.is_set():
                self._end()

    def _turn(self, passed: float) -> bool:
        """Tells where this rank is, and looks at the others: rank 0 at all, each other one at rank 0. Returns whether
        the job has to end.
        """
        self._tell()
        if self.store.check([VERDICT]):
            return True
        ranks = range(self.world) if self.rank == 0 else range(1)
        places = [Place(**json.loads(value)) for value in self.store.multi_get([f"rank {rank}" for rank in ranks])]
        for rank, place in enumerate(places):
            turn, since = self._seen.get(rank, (place.turn, 0.0))
            self._seen[rank] = (place.turn, since + passed if place.turn == turn else 0.0)
        silences = [self._seen[rank][1] for rank in ranks]
        if self.rank == 0:
            found = judge(places, silences, self.seconds, self.logs)
            self._write(places)
        else:
            lost = silences[0] > places[0].limit(self.seconds)
            found = silent({0: silences[0]}, places, self.logs) if lost else None
        if found is not None:
            self.store.set(VERDICT, str(found))
            report_errors([found])
        return found is not None

    def _tell(self) -> None:
        frames = list(stack(sys._current_frames().get(self._main)))
        # Only where it is in question: a frame whose variables were read keeps them alive until it returns.
        asked = self.place.idle > self.seconds / 3
        found = [self.modules.get(id(frame.f_locals.get("self"))) for frame in frames] if asked else []
        self.place.module = next(filter(None, found), None)
        waits = self.place.waits or any(frame.f_code.co_filename.endswith(EXCHANGES) for frame in frames)
        self.place.turn += 1
        self.store.set(f"rank {self.rank}", json.dumps({**vars(self.place), "waits": waits}))

    def _write(self, places: list[Place]) -> None:
        """heartbeat.json."""
        temporary = self.logs / "heartbeat.json.new"
        with suppress(OSError):  # a full disk is told by who needs it
            temporary.write_text(json.dumps([vars(place) for place in places]))
            temporary.replace(self.logs / "heartbeat.json")

    def _end(self) -> None:
        """Writes the stacks of this rank and its data workers, and ends the process."""
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        for child in multiprocessing.active_children():
            if child.pid is not None:
                with suppress(OSError):
                    os.kill(child.pid, signal.SIGUSR1)
        time.sleep(GRACE if self.rank == 0 else 1.0)  # rank 0, which holds the store, leaves last
        for child in multiprocessing.active_children():  # a stopped one would outlive this rank
            child.kill()
        os._exit(HUNG)


def judge(places: list[Place], silences: list[float], seconds: float, logs: Path) -> UserError | None:
    """What is to be told if ranks stand still, None if none does.

    Args:
        places: of all ranks.
        silences: seconds since each was heard of.
        seconds: the limit.
    """
    gone = {rank: since for rank, since in enumerate(silences) if since > places[rank].limit(seconds)}
    if not gone and any(place.idle > place.limit(seconds) for place in places):
        # A rank that still tells where it is does not hold up one that does not, whatever both said last.
        gone = {rank: since for rank, since in enumerate(silences) if since > seconds / 2}
        if not gone:
            return standing(holding_up(places), places, logs)
    return silent(gone, places, logs) if gone else None


def silent(ranks: dict[int, float], places: list[Place] | None, logs: Path) -> UserError:
    """What is told of ranks that tell nothing, for so many seconds."""
    first, since = next(iter(ranks.items()))
    last = f", last {where(places[first])} ({places[first].process})" if places else ""
    return UserError(
        name(list(ranks)),
        f"has not been heard of for {since:.0f} s{last}: it was stopped, died, or lost its network",
        f"Look at that machine, and at {logs}/rank_*.stacks.txt; then run again with --resume.",
    )


def holding_up(places: list[Place]) -> list[int]:
    """Which ranks hold up the others: those that are behind, and of these, who does not wait for others."""
    least = min((place.step, place.count) for place in places)
    behind = [rank for rank, place in enumerate(places) if (place.step, place.count) == least]
    return [rank for rank in behind if not places[rank].waits] or behind


def standing(ranks: list[int], places: list[Place], logs: Path) -> UserError:
    """What is told of ranks that hold up the others."""
    place = places[ranks[0]]
    others = "; the other ranks wait for it" if len(ranks) < len(places) else ""
    if all(places[rank].waits for rank in ranks):
        others = "; all ranks wait in an exchange with each other"
    return UserError(
        name(ranks),
        f"stands still for {place.idle:.0f} s {where(place)} ({place.process}){others}",
        f"Look at {logs}/rank_*.stacks.txt, then run again with --resume; if it is only slow, raise "
        "training.watchdog_seconds.",
    )


def where(place: Place) -> str:
    """In words."""
    module = f", in {place.module}" if place.module else ""
    return f"in phase {place.phase} after step {place.step}{module}"


def name(ranks: list[int]) -> str:
    """rank 3, or ranks 1, 2."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def stack(frame: FrameType | None) -> Any:
    """Frames from the innermost outwards."""
    while frame is not None:
        yield frame
        frame = frame.f_back
