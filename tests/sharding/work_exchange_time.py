"""What ranks do for the tests of the exchange timer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sharding.exchange_time import ExchangeTimer, Waits

LATE = 0.3  # seconds by which rank 1 comes later


def collectives() -> dict[str, Any]:
    """Every kind of call that training makes, by name."""
    world, x = dist.get_world_size(), torch.ones(8)
    whole, part = torch.empty(8 * world), torch.empty(8)

    def later() -> None:
        dist.all_reduce(x, async_op=True).wait()

    return {
        "all_reduce": lambda: dist.all_reduce(x),
        "all_reduce, not waited for at once": later,
        "all_gather": lambda: dist.all_gather(list(whole.chunk(world)), x),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(whole, x),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(part, whole),
        "reduce": lambda: dist.reduce(x, 0),
        "broadcast": lambda: dist.broadcast(x, 0),
        "barrier": dist.barrier,
        "all_gather_object": lambda: dist.all_gather_object([None] * world, "x"),
    }


def watch(folder: Path) -> dict[str, Any]:
    """Spans per kind of call; times when rank 1 comes late; what is left when the timer is off."""
    before = dict(vars(dist.ProcessGroup)), dict(vars(dist.Work))
    timer, spans = ExchangeTimer(), {}
    for name, call in collectives().items():
        with timer:
            call()
        spans[name] = len(timer.read())
    call()
    unchanged = before == (dict(vars(dist.ProcessGroup)), dict(vars(dist.Work)))

    waits, told = Waits(3), []
    for _ in range(4):
        with timer:
            if dist.get_rank() == 1:
                time.sleep(LATE)
            dist.all_reduce(torch.ones(8))
        told.append(waits.add(timer.read()))
    uneven = Waits(1).add([0.1] * (1 + dist.get_rank()))
    return {"spans": spans, "off": len(timer.read()), "unchanged": unchanged, "told": told, "uneven": uneven}
