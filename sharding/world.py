"""Which rank this process is, and joining the others."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from sharding.errors import UserError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_ID", "SLURM_JOB_ID", "SLURM_STEP_NODELIST")
BATCH_STEP = 0xFFFFFFF0  # Slurm's step ids from here on (batch script, interactive shell) are no srun steps


@dataclass(frozen=True)
class World:
    """This process among `size` ranks."""

    rank: int
    size: int
    local_rank: int
    master_address: str
    master_port: int


def read_world(environment: Mapping[str, str]) -> World | None:
    """The world that torchrun or srun has prepared; None outside of both.

    Raises:
        UserError: a partial environment, naming what is missing.
    """
    if any(name in environment for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        values = complete(environment, TORCHRUN, "torchrun")
        address, port = values["MASTER_ADDR"], number(values, "MASTER_PORT")
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif int(environment.get("SLURM_STEP_ID", BATCH_STEP)) < BATCH_STEP and int(environment.get("SLURM_NTASKS", 1)) > 1:
        values = complete(environment, SLURM, "srun")
        address = environment.get("MASTER_ADDR", first_host(values["SLURM_STEP_NODELIST"]))
        # A port of one's own per job and step, in the range that systems leave to users.
        job = number(values, "SLURM_JOB_ID") * 31 + number(values, "SLURM_STEP_ID")
        port = int(environment.get("MASTER_PORT", 20_000 + job % 10_000))
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    else:
        return None
    rank, size, local_rank = (number(values, name) for name in names)
    if rank >= size:
        raise UserError("environment", f"{names[0]} is {rank}, but {names[1]} is {size}", "Ranks count from 0.")
    return World(rank, size, local_rank, address, port)


def number(values: Mapping[str, str], name: str) -> int:
    """A variable that must be a whole number from 0 on."""
    if not values[name].isdecimal():
        raise UserError("environment", f"{name} is {values[name]!r}", "It must be a whole number, from 0 on.")
    return int(values[name])


def first_host(nodelist: str) -> str:
    """First host of a Slurm node list such as `gpu[03-07,12],login1`: there task 0 runs."""
    first = re.split(r",(?![^\[]*\])", nodelist)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def complete(environment: Mapping[str, str], names: tuple[str, ...], launcher: str) -> dict[str, str]:
    """The named variables, or UserError naming those that are missing."""
    missing = [name for name in names if name not in environment]
    if missing:
        raise UserError(
            "environment",
            f"{', '.join(missing)} missing although other variables of {launcher} are set",
            f"Start all ranks with {launcher}, or unset its variables to run on this machine alone.",
        )
    return {name: environment[name] for name in names}


def join(world: World, *, with_deepspeed: bool, timeout_minutes: float = 30) -> None:
    """Creates the process group (NCCL on GPUs, gloo else) and picks this rank's GPU."""
    os.environ.update(
        RANK=str(world.rank),
        WORLD_SIZE=str(world.size),
        LOCAL_RANK=str(world.local_rank),
        MASTER_ADDR=world.master_address,
        MASTER_PORT=str(world.master_port),
    )
    import torch  # noqa: PLC0415  the launcher reads the world without it

    backend, timeout = "nccl" if torch.cuda.is_available() else "gloo", timedelta(minutes=timeout_minutes)
    if torch.cuda.is_available():
        torch.cuda.set_device(world.local_rank % torch.cuda.device_count())
    torch.distributed.init_process_group(backend, timeout=timeout)
    if with_deepspeed:
        import deepspeed  # noqa: PLC0415

        with contextlib.redirect_stdout(None):  # each rank would print that its op is built
            deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)


def leave() -> None:
    """Ends the process group."""
    import torch.distributed as dist  # noqa: PLC0415

    if dist.is_initialized():
        dist.destroy_process_group()


def add_interpreter_to_path() -> None:
    """DeepSpeed looks for `ninja` on PATH; it lies beside the interpreter even if the environment is not activated."""
    own = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", "")
    if own not in path.split(os.pathsep):
        os.environ["PATH"] = own + os.pathsep + path
