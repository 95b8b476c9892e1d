"""One rank of a submitted run. The object is pickled by Submitit by the name of its class: it holds no more than where
the run is, so that a requeued job goes on with what the files say.
"""

from __future__ import annotations

import atexit
import json
import os
import platform
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from submitit.helpers import DelayedSubmission

from sharding.errors import UserError, UserErrors
from sharding.launch import FAILED_RANK_FILE, INTERRUPTED, free_port, report_errors
from sharding.signals import StopFlag
from sharding.world import World, read_world
from slurm.queue import expand
from slurm.record import Attempt, Launch, LaunchRecord

DEADLINE = "DIST_TRAIN_DEADLINE"  # environment variable: seconds since the epoch when the job ends
LOCAL_JOB, LOCAL_RESTART = "DIST_TRAIN_JOB", "DIST_TRAIN_RESTART"  # set by slurm.local instead of Slurm's variables
OUTCOME = "outcome.json"  # in the folder of an attempt's reports: how it ended, if rank 0 could tell
CRASHED = 1


@dataclass(frozen=True)
class TrainingJob:
    """Trains in this process, as the rank that Slurm made it.

    Args:
        run: the run directory, absolute.
    """

    run: str

    def __call__(self) -> str:
        """Returns how it ended: finished or stopped. Ends the process with a code of its own where the run fails: 2 for
        a user's mistake, 75 for a run that stood still, 1 for all else.
        """
        record = LaunchRecord(Path(self.run))
        launch = record.read_launch()
        with StopFlag(read_deadline(os.environ, launch.settings.signal_seconds)) as stop:
            job, restart = identity(os.environ)
            reports = record.reports(job, restart)
            reports.mkdir(parents=True, exist_ok=True)
            rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
            os.environ[FAILED_RANK_FILE] = str(reports / f"rank_{rank}.error.json")
            try:
                world = this_world(os.environ)
                if world.rank == 0:
                    record.add_attempt(begun(record.run, job, restart, world))
                outcome = train_here(world, record, launch, stop, reports)
            except (UserError, UserErrors) as error:
                report_errors(error.errors if isinstance(error, UserErrors) else [error])
                leave(2)
            except BaseException as error:
                traceback.print_exc()
                what = " ".join(f"{type(error).__name__}: {error}".split())
                report_errors([UserError(f"rank {rank} on {platform.node()}", what, "Its log has the traceback.")])
                leave(CRASHED)
        if world.rank == 0:
            write_outcome(reports, outcome)
        atexit.register(leave, 0)  # interpreter shutdown after gloo now and then aborts although all work is done
        return outcome

    def checkpoint(self) -> DelayedSubmission:
        """What Submitit requeues if its own signal handler is hit, before ours stands: the same."""
        return DelayedSubmission(self)


def train_here(world: World, record: LaunchRecord, launch: Launch, stop: StopFlag, reports: Path) -> str:
    """Preflight and training in this rank. Returns the outcome."""
    from sharding.ops import prepare_ops  # noqa: PLC0415  all below need torch: the signal handler stands first

    prepare_ops(print if world.rank == 0 else lambda text: None)  # before anything imports DeepSpeed
    from dist_train.rank import run_training  # noqa: PLC0415
    from dist_train.run_directory import RunDirectory  # noqa: PLC0415
    from sharding import world as worlds  # noqa: PLC0415

    run = RunDirectory(record.run)
    resume = run.recipe.is_file()
    code = run_training(
        world,
        record.recipe,
        [],
        run,
        fresh=False,
        resume=resume,
        accept_other_base=launch.accept_other_base,
        stop=stop,
        examine=(lambda recipe: examine_nodes(recipe, run, reports)) if launch.settings.preflight else None,
    )
    import torch.distributed as dist  # noqa: PLC0415

    dist.barrier()  # a rank that ends while others still save would have them killed
    worlds.leave()
    return "stopped" if code == INTERRUPTED else "finished"


def examine_nodes(recipe: Any, run: Any, reports: Path) -> None:
    """Preflight, before anything is loaded (collective). Ends the process if nodes are bad, or a rank hangs or is gone.

    Raises:
        UserErrors: what a user must mend; empty on all ranks but one.
    """
    import torch.distributed as dist  # noqa: PLC0415

    from slurm.preflight.examine import preflight  # noqa: PLC0415
    from slurm.preflight.table import preflight_table  # noqa: PLC0415

    found = preflight(recipe, run, nodes=nodes_of_ranks(dist.get_world_size()))
    speaker = next(rank for rank in range(dist.get_world_size()) if rank not in found.silent)
    if dist.get_rank() == speaker:
        Console(width=120).print(preflight_table(found))
    if found.good:
        return
    if found.bad_nodes:
        nodes = {one.node: f"{one.check}: {one.problem}" for one in found.findings if one.severity == "bad node"}
        if dist.get_rank() == speaker:
            write_outcome(reports, "bad nodes", nodes)
        else:  # the first rank that ends has the others killed
            deadline = time.monotonic() + 20
            while not (reports / OUTCOME).exists() and time.monotonic() < deadline:
                time.sleep(0.1)
        leave(CRASHED)
    raise UserErrors(found.errors() if dist.get_rank() == speaker else [])


def nodes_of_ranks(world: int) -> list[str] | None:
    """Which node Slurm has started each rank on: as many on each, one node after another."""
    nodes = expand(os.environ.get("SLURM_STEP_NODELIST", ""))
    if not nodes or world % len(nodes):
        return None
    return [node for node in nodes for _ in range(world // len(nodes))]


def this_world(environment: Mapping[str, str]) -> World:
    """The world this rank belongs to, and the network it is reached by.

    Raises:
        UserError: a variable of srun is missing.
    """
    # Torch alone would take all cores of the node, in every rank of it.
    os.environ.setdefault("OMP_NUM_THREADS", environment.get("SLURM_CPUS_PER_TASK", "1"))
    world = read_world(environment)
    if world is None:
        return World(0, 1, 0, "127.0.0.1", free_port())
    address = world.master_address
    launcher = environment.get("SLURM_LAUNCH_NODE_IPADDR")  # of the job's first node, where task 0 runs
    try:
        socket.getaddrinfo(address, None)
    except OSError:
        if launcher is None:
            raise UserError(
                "MASTER_ADDR", f"the host {address} has no address here", "Set MASTER_ADDR in the launch file."
            ) from None
        address = launcher
    interface = interface_towards(launcher or address)
    if interface is not None:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, interface)
    return World(world.rank, world.size, world.local_rank, address, world.master_port)


def interface_towards(address: str) -> str | None:
    """Name of the network interface by which that host is reached; None if it is this host without a network."""
    import psutil  # noqa: PLC0415  only inside a job

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # sends nothing
        except OSError:
            return None
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == own for entry in addresses):
            return None if name == "lo" else name
    return None


def read_deadline(environment: Mapping[str, str], seconds: float) -> float | None:
    """When to save at the latest: Slurm's signal should have come then, and most of the time it leaves is left."""
    text = environment.get(DEADLINE, "")
    return float(text) - 0.8 * seconds if text.isdecimal() else None


def identity(environment: Mapping[str, str]) -> tuple[str, int]:
    """Job id, as Submission.job has it, and how often it was started before."""
    if LOCAL_JOB in environment:
        return environment[LOCAL_JOB], int(environment[LOCAL_RESTART])
    job = environment.get("SLURM_JOB_ID", "0")
    if "SLURM_ARRAY_JOB_ID" in environment:
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return job, int(environment.get("SLURM_RESTART_COUNT", "0"))


def begun(run: Path, job: str, restart: int, world: World) -> Attempt:
    """The attempt that starts now."""
    nodes = expand(os.environ.get("SLURM_JOB_NODELIST", "")) or [platform.node()]
    return Attempt(
        job=job, restart=restart, started=time.time(), nodes=nodes, ranks=world.size, first_step=saved_step(run)
    )


def saved_step(run: Path) -> int:
    """Step of the last checkpoint; 0 without one."""
    try:
        return int((run / "checkpoints" / "last").resolve(strict=True).name.rpartition("_")[2])
    except (OSError, ValueError):
        return 0


def write_outcome(reports: Path, outcome: str, nodes: Mapping[str, str] | None = None) -> None:
    """How the attempt ended, and bad nodes with what is wrong with them; whole or not at all."""
    temporary = reports / (OUTCOME + ".new")
    temporary.write_text(json.dumps({"outcome": outcome, "nodes": dict(nodes or {})}))
    temporary.replace(reports / OUTCOME)


def leave(code: int) -> None:
    """Ends the process at once."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    TrainingJob(sys.argv[1])()
