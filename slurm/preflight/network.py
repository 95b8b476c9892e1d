"""How fast ranks and nodes exchange: every pair of nodes, every pair of ranks of a node, and all together.

What is measured next rank 0 decides from what came before (`tournament`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sharding.collectives import device
from slurm.preflight.exchange import Exchange, within
from slurm.preflight.tournament import Rate, Reports, Steering, Step

PROBE = 256 * 1024  # bytes from which the size of the measurement is judged
# Bytes of a message, and of an all-reduce: on a CPU they should be through before another process has its turn.
LARGEST = {"cuda": 64 * 2**20, "cpu": 2**20}
LARGEST_SUM = {"cuda": 256 * 2**20, "cpu": 2 * 2**20}
REPEATS = 5
MESSAGE_SECONDS = 0.02  # that one measured message should take
WAITS = timedelta(minutes=10)  # of groups made here; whoever waits in them is given up much sooner


def check_network(exchange: Exchange, nodes: Sequence[str], seconds: float, until: float) -> Steering | None:
    """Measures (collective). Returns what rank 0 found (in other ranks it is empty); None if a rank fell silent.

    Args:
        nodes: name of the node of each rank.
        seconds: for an all-reduce of all ranks; NCCL takes long to join many. Pairs get a third.
        until: when rank 0 begins no more rounds of pairs (time.monotonic).
    """
    steering, groups = Steering(nodes, until), Groups(nodes)
    steps = steering.steps()

    def next_step(reports: Reports) -> Step | None:
        if exchange.silent:
            return None
        try:
            return next(steps) if reports[0] is None else steps.send(reports)
        except StopIteration:
            return None

    report: Any = None
    limit, clean = seconds, True
    while (step := exchange.report(report, next_step, limit)) is not None:
        report = {"rate": None, "problem": None}
        limit = seconds / 3 if "pairs" in step else seconds
        try:
            rate = within(limit, lambda: carry_out(step, exchange.rank, groups))
            report["rate"] = None if rate is None else rate.model_dump()
        except TimeoutError:
            report["problem"], clean = f"nothing came within {limit:.0f} s", False
        except RuntimeError as error:  # what torch and its backends raise
            report["problem"], clean = str(error).splitlines()[0], False
    if clean and not exchange.silent:
        groups.destroy()
    return None if exchange.silent else steering


class Groups:
    """Groups for the measurement alone, made when they are needed. NCCL keeps buffers for each pair that has ever
    exchanged until its group is destroyed; gloo's default group is joined already, pair by pair.
    """

    def __init__(self, nodes: Sequence[str]) -> None:
        self.nodes = nodes
        self.everyone: Any = None
        self.node: Any = None

    def world(self) -> Any:
        """Of all ranks."""
        if self.everyone is None:
            own = dist.get_backend() == "nccl"
            self.everyone = dist.new_group(timeout=WAITS) if own else dist.group.WORLD
        return self.everyone

    def own_node(self) -> Any:
        """Of the ranks of this node. All ranks make all groups."""
        if self.node is None:
            for name in dict.fromkeys(self.nodes):
                ranks = [rank for rank, node in enumerate(self.nodes) if node == name]
                if len(ranks) > 1:
                    made = dist.new_group(ranks, timeout=WAITS)
                    self.node = made if dist.get_rank() in ranks else self.node
        return self.node

    def destroy(self) -> None:
        """Gives back what was made here."""
        for group in (self.node, self.everyone):
            if group is not None and group is not dist.group.WORLD:
                dist.destroy_process_group(group)


def carry_out(step: Step, rank: int, groups: Groups) -> Rate | None:
    """One rank's part of a step; None if it has none."""
    # A stream of its own: work that never ends on another one must not hold this up.
    own: AbstractContextManager[Any] = nullcontext()
    if torch.cuda.is_available():
        own = torch.cuda.stream(torch.cuda.Stream())
    with own:
        if "pairs" in step:
            world = groups.world()
            for first, second in step["pairs"]:
                if rank in (first, second):
                    return measure_pair(second if rank == first else first, world, leads=rank == first)
            return None
        if step["all_reduce"] is None:
            return measure_all_reduce(groups.world())
        group = groups.own_node()
        return measure_all_reduce(group) if group is not None and groups.nodes[rank] in step["all_reduce"] else None


def measure_pair(peer: int, group: Any, *, leads: bool) -> Rate:
    """Messages there and back between two ranks; one of them leads."""
    here = device()

    def turn(message: Tensor) -> None:
        for send in (leads, not leads):
            if send:
                dist.send(message, peer, group=group)
            else:
                dist.recv(message, peer, group=group)

    small, probe = torch.zeros(1, device=here), torch.zeros(PROBE // 4, device=here)
    timed(turn, small, 1)  # connects
    latency = timed(turn, small, 10) / 2
    seconds = timed(turn, probe, 2) / 2
    # What the leader says counts for both.
    size = torch.tensor(sized(seconds / PROBE, MESSAGE_SECONDS, LARGEST[here.type]), device=here)
    (dist.send if leads else dist.recv)(size, peer, group=group)
    if (whole := int(size)) > PROBE:
        seconds = timed(turn, torch.zeros(whole // 4, device=here), REPEATS) / 2
    return Rate(bytes_per_second=max(whole, PROBE) / seconds, seconds=latency)


def measure_all_reduce(group: Any) -> Rate:
    """All-reduces of one number and of many."""
    here, ranks = device(), dist.get_world_size(group)

    def turn(message: Tensor) -> None:
        dist.all_reduce(message, group=group)

    small = torch.zeros(1, device=here)
    timed(turn, small, 1)
    latency = timed(turn, small, 10)
    slowest = torch.tensor(timed(turn, torch.zeros(PROBE // 4, device=here), 2), device=here)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group)
    size = max(sized(float(slowest) / PROBE, 2 * MESSAGE_SECONDS, LARGEST_SUM[here.type]), PROBE)
    seconds = timed(turn, torch.zeros(size // 4, device=here), REPEATS)
    return Rate(bytes_per_second=2 * (ranks - 1) / ranks * size / seconds, seconds=latency)


def sized(seconds_per_byte: float, seconds: float, largest: int) -> int:
    """Bytes that take so long, as a multiple of 4."""
    return min(int(seconds / max(seconds_per_byte, 1e-12)), largest) // 4 * 4


def timed(action: Callable[[Tensor], None], message: Tensor, times: int) -> float:
    """Seconds of the fastest of several calls: what else the machine does makes some slower, none faster."""
    fastest = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        action(message)
        if message.is_cuda:
            torch.cuda.current_stream().synchronize()
        fastest = min(fastest, time.perf_counter() - began)
    return fastest
