"""Ask this machine what Slurm it has: commands, controller, partitions, accounting. Reads only, submits nothing."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field

from slurm.ask import ask

COMMANDS = ("sbatch", "srun", "sinfo", "sacct")
# Partition (default one starred), availability, time limit, nodes, generic resources, node state. `--json` needs a
# plugin that many builds lack; the format string works on every version.
SINFO_FORMAT = "%P|%a|%l|%D|%G|%t"


@dataclass
class Partition:
    """One partition: its nodes over all states, the kinds of GRES they carry, and its time limit as Slurm prints it."""

    name: str
    default: bool
    available: bool
    time_limit: str
    nodes: int = 0
    gres: list[str] = field(default_factory=list)
    states: dict[str, int] = field(default_factory=dict)


@dataclass
class SlurmStatus:
    """What `probe` found.

    Attributes:
        commands: command name -> path, None where it is not on PATH.
        version: as `sinfo --version` prints it, None when unknown.
        reachable: the controller answered within the timeout.
        partitions: in the order of `sinfo`; empty when the controller did not answer.
        accounting: `sacct` answers, so that ended jobs can be asked about.
        problem: one line on what is wrong, empty when jobs can be submitted.
    """

    commands: dict[str, str | None]
    version: str | None = None
    reachable: bool = False
    partitions: list[Partition] = field(default_factory=list)
    accounting: bool = False
    problem: str = ""

    @property
    def found(self) -> bool:
        """True when jobs can be submitted from here: sbatch, srun and sinfo are on PATH."""
        return all(self.commands[name] for name in ("sbatch", "srun", "sinfo"))

    @property
    def default_partition(self) -> str | None:
        """Where jobs go that name none."""
        return next((partition.name for partition in self.partitions if partition.default), None)


def probe(timeout: float = 5.0) -> SlurmStatus:
    """Look for Slurm on this machine.

    Args:
        timeout: seconds given to each question that goes over the network (controller, accounting).
    """
    status = SlurmStatus({name: shutil.which(name) for name in COMMANDS})
    if not status.found:
        absent = [name for name in ("sbatch", "srun", "sinfo") if not status.commands[name]]
        status.problem = "not found" if len(absent) == 3 else f"{', '.join(absent)} not found on PATH"
        return status
    _, version = ask(["sinfo", "--version"], timeout)
    status.version = version if version.startswith("slurm") else None
    status.reachable, answer = ask(["sinfo", "--noheader", "--all", "--format", SINFO_FORMAT], timeout)
    if not status.reachable:
        status.problem = f"controller not reachable: {answer}"
        return status
    status.partitions = parse_partitions(answer)
    if not any(partition.available for partition in status.partitions):
        status.problem = "no partition is up"
    if status.commands["sacct"]:
        status.accounting, _ = ask(["sacct", "--noheader", "--allocations", "--starttime", "now"], timeout)
    return status


def parse_partitions(text: str) -> list[Partition]:
    """Parse `sinfo --format SINFO_FORMAT`: one line per partition and group of like nodes, merged by partition."""
    partitions: dict[str, Partition] = {}
    for line in text.splitlines():
        columns = line.split("|")
        if len(columns) != 6 or not columns[3].strip().isdigit():
            continue  # warnings that plug-ins print on stdout
        starred, available, limit, nodes, gres, state = (column.strip() for column in columns)
        name = starred.rstrip("*")
        partition = partitions.setdefault(name, Partition(name, starred.endswith("*"), available == "up", limit))
        partition.nodes += int(nodes)
        if gres not in ("", "(null)") and gres not in partition.gres:
            partition.gres.append(gres)
        if int(nodes):
            partition.states[state] = partition.states.get(state, 0) + int(nodes)
    return list(partitions.values())
