"""What the ranks of the preflight's tests do."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dist_train.run_directory import RunDirectory
from slurm.preflight.examine import Preflight, preflight
from tests import tiny


def examine(folder: Path, shards: str, seconds: float = 30) -> Preflight:
    """A preflight of a tiny recipe; a rank's node is what the environment says."""
    return preflight(tiny.recipe(Path(shards), data={"batch": 16}), RunDirectory(folder / "run"), seconds=seconds)


def everywhere(found: Preflight) -> list[Any]:
    """What each rank has found."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, found.model_dump(mode="json"))
    return values


def repeated(folder: Path, shards: str, times: int) -> list[Any]:
    """Several in the same world, as each rank has the last one; exchanges between them go on working."""
    for _ in range(times):
        found = examine(folder, shards)
        dist.barrier()
    return everywhere(found)


def shifted(folder: Path, shards: str, rank: int, ahead: float) -> list[Any]:
    """The clock of one rank is ahead: this is all of it that a process sees."""
    if dist.get_rank() == rank:
        true = time.time
        time.time = lambda: true() + ahead
    return everywhere(examine(folder, shards))


def cut(folder: Path, shards: str, rank: int, address: str) -> list[Any]:
    """One rank, root in its network namespace, drops what it would send to an address."""
    if dist.get_rank() == rank:
        subprocess.run(["ip", "route", "add", "blackhole", f"{address}/32"], check=True)
    return [examine(folder, shards, seconds=12).model_dump(mode="json")]


def lost(folder: Path, shards: str, rank: int, how: str) -> Any:
    """One rank stops or ends in the middle of the preflight. The next one writes what it has found and lets a stopped
    one go on, so that the test's processes all end.
    """
    own, process = dist.get_rank(), folder / "process"
    if own == rank:
        process.write_text(str(os.getpid()))

        def leave() -> None:
            while not list(folder.glob("run/slurm/preflight_*")):
                time.sleep(0.001)
            if how == "stops":
                os.kill(os.getpid(), signal.SIGSTOP)
            else:
                os._exit(0)

        threading.Thread(target=leave, daemon=True).start()
    dist.barrier()
    began = time.monotonic()
    found = examine(folder, shards, seconds=8)
    if own == (rank + 1) % dist.get_world_size():
        (folder / "seconds").write_text(str(time.monotonic() - began))
        (folder / "found.json").write_text(found.model_dump_json())
        if how == "stops":
            os.kill(int(process.read_text()), signal.SIGCONT)
    return None
