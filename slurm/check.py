"""What would go wrong is told before anything is queued: the cluster against the launch settings, the recipe against
ranks, data and GPU memory.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import psutil

from sharding.errors import UserError, UserErrors
from slurm.ask import ask
from slurm.probe import probe
from slurm.settings import LaunchSettings, minutes

FIELDS = "%R|%l|%D|%G|%c|%m|%t|%a"  # partition, time limit, nodes, GRES, CPUs, MB, state, availability
IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
OWN_DISK = ("/tmp", "/var/tmp", "/dev/shm", "/local", "/scratch/local")  # as a rule not shared between nodes


@dataclass
class NodeGroup:
    """Like nodes of a partition."""

    partition: str
    limit: str
    nodes: int
    gpus: int
    gpu_types: tuple[str, ...]
    cpus: int
    megabytes: int
    state: str


def check_cluster(settings: LaunchSettings, timeout: float = 20.0) -> list[str]:
    """Refuses what no partition could run. Returns notes.

    Raises:
        UserError: there is no Slurm, or it does not answer.
        UserErrors: each thing asked for that the partition does not have.
    """
    status = probe(timeout)
    here = "Run this on a login node of the cluster, or give --cluster local."
    if not status.found:
        problem = status.problem if status.problem != "not found" else "its commands are not on PATH"
        raise UserError("Slurm", problem, here)
    if not status.reachable:
        raise UserError("Slurm", status.problem, "Check SLURM_CONF and the controller (scontrol ping); try again.")
    name = settings.partition or status.default_partition
    known = ", ".join(part.name for part in status.partitions)
    if name is None:
        raise UserError("--partition", "none is given, and the cluster has no default", f"Known: {known}.")
    for part in name.split(","):
        if part not in {partition.name for partition in status.partitions}:
            raise UserError("--partition", f"{part} is unknown to this cluster", f"Known: {known}.")
    groups = [group for part in name.split(",") for group in node_groups(part)]
    errors = unmet(settings, name, groups)
    if errors:
        raise UserErrors(errors)
    notes = []
    if not status.accounting:
        notes.append("Accounting is off (no sacct): how an ended job ended is told by the run's own files alone.")
    usable = sum(group.nodes for group in groups if not re.match(r"down|drain|fail|inval|unk|not_resp", group.state))
    if usable < settings.node_counts[0]:
        notes.append(
            f"Only {usable} of {sum(group.nodes for group in groups)} nodes of {name} are up: the job waits for others "
            "(dist-train status tells; sinfo -R says why they are down)."
        )
    return notes


def unmet(settings: LaunchSettings, name: str, groups: list[NodeGroup]) -> list[UserError]:
    """What is asked for and no node of the partition has."""
    errors = []
    gpus = max((group.gpus for group in groups), default=0)
    cpus = max((group.cpus for group in groups), default=0)
    nodes = sum(group.nodes for group in groups)
    asked = settings.ranks * settings.cpus_per_rank
    if settings.gpus_per_node > gpus:
        remedy = f"Give --gpus-per-node {gpus} or less." if gpus else "Give another --partition, or --gpus-per-node 0."
        problem = f"{settings.gpus_per_node} asked for, nodes of {name} have {gpus}"
        errors.append(UserError("--gpus-per-node", problem, remedy))
    if asked > cpus:
        problem = f"{settings.ranks} ranks × {settings.cpus_per_rank} cores asked for, nodes of {name} have {cpus}"
        errors.append(UserError("--cpus-per-rank", problem, f"Give {max(cpus // settings.ranks, 1)} or less."))
    if settings.node_counts[0] > nodes:
        problem = f"{settings.nodes} asked for, {name} has {nodes}"
        errors.append(UserError("--nodes", problem, f"Give {nodes} or fewer."))
    limits = [minutes(group.limit) for group in groups if group.limit]
    longest = None if None in limits or not limits else max(limit for limit in limits if limit is not None)
    if longest is not None and settings.minutes > longest:
        problem = f"{settings.time} is over the limit of {name}, {groups[0].limit}"
        remedy = f"Give --time {groups[0].limit} or less: the run saves, is requeued and goes on."
        errors.append(UserError("--time", problem, remedy))
    if settings.minutes * 60 <= settings.signal_seconds:
        problem = f"{settings.time} leaves nothing beside the {settings.signal_seconds} s for saving"
        errors.append(UserError("--time", problem, "Give more, or a smaller signal_seconds."))
    return errors


def node_groups(partition: str) -> list[NodeGroup]:
    """Groups of like nodes of a partition, as sinfo has them."""
    _, text = ask(["sinfo", "--noheader", "--partition", partition, "--format", FIELDS], 20.0)
    groups = []
    for line in text.splitlines():
        columns = [column.strip() for column in line.split("|")]
        if len(columns) != 8 or not columns[2].isdigit():
            continue
        name, limit, nodes, gres, cpus, megabytes, state, _ = columns
        found = re.findall(r"gpu(?::([A-Za-z][\w.-]*))?:(\d+)", gres)
        groups.append(
            NodeGroup(
                name,
                "" if limit == "infinite" else limit,
                int(nodes),
                sum(int(count) for _, count in found),
                tuple(kind for kind, _ in found if kind),
                int(cpus.rstrip("+")),
                int(megabytes.rstrip("+")),
                state,
            )
        )
    return groups


def check_place(output: Path) -> list[str]:
    """Refuses a run directory that only this machine sees, as far as its disk tells. Returns notes.

    Raises:
        UserError: it lies in this machine's memory, or cannot be written to.
    """
    place = output.absolute()
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        raise UserError(str(place), "cannot be written to", "Give an --output on a shared disk you may write to.")
    mounts = [part for part in psutil.disk_partitions(all=True) if place.resolve().is_relative_to(part.mountpoint)]
    kind = max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else ""
    shared = "Give an --output on a disk that all nodes share."
    if kind in IN_MEMORY:
        raise UserError(str(output), f"lies in this machine's memory ({kind})", shared)
    if any(place.resolve().is_relative_to(folder) for folder in OWN_DISK):
        return [f"{output} is usually a disk of this machine alone. If nodes do not share it, the job ends at once."]
    return []
