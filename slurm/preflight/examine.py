"""Looks at nodes, network, disks and data before a job's first step, in every rank, and names what is bad.

All nodes are examined at the same time. Each check runs in a thread with a time limit, and what it raises is a finding
of its rank. Ranks tell rank 0 over a store (`exchange`), so that one which hangs or dies is missed and named
and holds up nobody. What is found are measurements first (`measure_…`), then verdicts about them in rank 0
(`judge_…`).
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel, Field

from dist_train.recipe import Recipe
from dist_train.run_directory import RunDirectory
from sharding.collectives import device
from sharding.errors import UserError
from sharding.heartbeat import beat
from slurm.preflight import device as preflight_device
from slurm.preflight import shards as preflight_shards
from slurm.preflight import space as preflight_space
from slurm.preflight import versions as preflight_versions
from slurm.preflight.device import Device, Smi
from slurm.preflight.directory import check_directory
from slurm.preflight.exchange import ARRIVAL, GRACE, Exchange, RankZeroSilent, Skew, within
from slurm.preflight.findings import Finding, findings_of, severity_of, spell
from slurm.preflight.network import check_network
from slurm.preflight.shards import Shards
from slurm.preflight.space import Disk
from slurm.preflight.tournament import Network

CLOCK = "clock"
SILENT = "answers"
UNKNOWN = "unknown"  # node of a rank that never answered
TICKS = 5  # turns that compare the clocks
MOST_SKEW = 1.0  # seconds between clocks that nobody minds


class Preflight(BaseModel):
    """What a preflight found. The same on all ranks that answer."""

    number: int = Field(0, description="Random, to tell it from others of the same run.")
    nodes: list[str] = Field(description="Name of the node of each rank, as Slurm has it.")
    seconds: dict[str, float] = Field(default_factory=dict, description="Of each check, in the slowest rank.")
    versions: dict[str, str] = Field(default_factory=dict, description="Of rank 0.")
    devices: dict[int, Device] = Field(default_factory=dict, description="By rank.")
    smi: dict[str, Smi] = Field(default_factory=dict, description="What nvidia-smi says, by node.")
    shards: dict[str, int] = Field(default_factory=dict, description="Samples read, by directory, over all ranks.")
    disk: Disk | None = Field(None, description="Where checkpoints go.")
    shared_memory: dict[str, int] = Field(default_factory=dict, description="Free bytes of /dev/shm, by node.")
    skew: dict[str, Skew] = Field(default_factory=dict, description="Of the nodes' clocks, from their median.")
    network: Network | None = None
    findings: list[Finding] = Field(default_factory=list)
    silent: list[int] = Field(
        default_factory=list,
        description="Ranks that did not answer. If there are any, no exchange between the ranks may follow.",
    )

    @property
    def bad_nodes(self) -> list[str]:
        """Nodes to run without."""
        return list(dict.fromkeys(one.node for one in self.findings if one.severity == "bad node"))

    @property
    def good(self) -> bool:
        """The job may begin; and nothing hangs in this process."""
        return all(one.severity == "note" for one in self.findings)

    def errors(self) -> list[UserError]:
        """What speaks against beginning."""
        return [as_error(one) for one in self.findings if one.severity != "note"]


def as_error(finding: Finding) -> UserError:
    """A finding as the command line tells it."""
    problem, _, remedy = finding.problem.rpartition(". ")
    rank = "" if finding.rank is None else f", rank {finding.rank}"
    return UserError(f"{finding.node}{rank}: {finding.check}", problem, remedy)


def preflight(
    recipe: Recipe, run: RunDirectory, *, seconds: float = 30, nodes: Sequence[str] | None = None
) -> Preflight:
    """Examines everything (collective, in a world that `sharding.world.join` has made). Rank 0 writes
    slurm/preflight.json in the run directory.

    A rank that does not answer is given up after the time its check has and some seconds. If any did not, or a check
    still hangs (then a finding says so), this process may not exchange with others any more and should end by
    `os._exit`.

    Args:
        recipe: as the run will have it.
        run: its directory; need not exist.
        seconds: that it should take at most where nothing hangs. Each check gets a quarter of it, a pair of ranks a
            third for its exchange, an all-reduce all of it; after four fifths no more pairs are measured.
        nodes: on which each rank was started, so that one that never answers can be named.
    """
    beat("preflight")
    found = Preflight(nodes=list(nodes or [UNKNOWN] * dist.get_world_size()))
    try:
        found = examine(recipe, run, seconds, found)
    except RankZeroSilent:
        found = without_rank_zero(found, run)
    if found.good and torch.cuda.is_available():  # the run's own peak is measured from here
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return found


def examine(recipe: Recipe, run: RunDirectory, seconds: float, found: Preflight) -> Preflight:
    """See `preflight`.

    Args:
        found: empty; filled in rank 0, and in others as far as they know.
    """
    exchange = Exchange()
    ranks, number = range(exchange.world), secrets.randbits(32)
    found.number, found.nodes = exchange.report(
        node_name(), lambda reports: [number, [reports.get(rank, found.nodes[rank]) for rank in ranks]], ARRIVAL
    )
    nodes = found.nodes
    began, limit = time.monotonic(), seconds / 4

    @contextlib.contextmanager
    def timed(check: str) -> Iterator[None]:
        before = time.monotonic()
        yield
        found.seconds[check] = time.monotonic() - before

    if not exchange.silent:
        results = run_checks(local_checks(recipe, run, found, limit), limit)
        exchange.report(results, lambda reports: judge_local(found, reports), len(results) * limit)
    if not exchange.silent:
        with timed("run directory"):
            found.findings += check_directory(exchange, run, nodes, limit)
    if not exchange.silent:
        with timed(CLOCK):
            for _ in range(TICKS):
                exchange.report(None, lambda _: None, limit)
        judge_clocks(found, exchange.skew())
    if not exchange.silent:
        with timed("network"):
            measured = check_network(exchange, nodes, seconds, began + 0.8 * seconds)
        if measured is not None:
            found.network = measured.network
            found.findings += measured.findings

    def conclude(_: Any) -> Any:
        found.seconds["all"] = time.monotonic() - began
        found.silent = exchange.silent
        found.findings += judge_silent(exchange.silent, nodes)
        write(found, run)
        return found.model_dump(mode="json")

    answer = exchange.report(None, conclude, limit)
    exchange.close()
    return Preflight.model_validate(answer)


def node_name() -> str:
    """Of this node, as Slurm excludes it; of the machine where there is no Slurm."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def local_checks(recipe: Recipe, run: RunDirectory, found: Preflight, limit: float) -> dict[str, Callable[[], Any]]:
    """What a rank finds out alone: JSON-able results by check. Some only the first rank of a node does, or rank 0."""
    rank, nodes = dist.get_rank(), found.nodes
    same = [one for one, node in enumerate(nodes) if node == nodes[rank]]
    here = device()

    def smi() -> Any:
        told = preflight_device.ask_smi() if rank == same[0] else None
        return None if told is None else told.model_dump()

    def shards() -> Any:
        until = time.monotonic() + limit / 2
        part = same.index(rank), len(same)
        looked = preflight_shards.look_at_shards(recipe.data, found.number, *part, until)
        return {path: one.model_dump() for path, one in looked.items()}

    def space() -> Any:
        room: dict[str, Any] = {"shared": None}
        if rank == same[0]:
            room["shared"] = preflight_space.free_bytes(preflight_space.SHARED)
        if rank == 0:
            try:
                room |= {
                    "disk": preflight_space.disk_for(recipe, run).model_dump(),
                    "worker": preflight_space.worker_bytes(recipe, len(nodes)),
                }
            except UserError as error:
                room["unknown"] = f"what the run needs cannot be foretold: {error.where} {error.problem}"
        return room

    return {
        preflight_device.CHECK: lambda: preflight_device.measure_device(here).model_dump(),
        preflight_device.SMI_CHECK: smi,
        preflight_versions.CHECK: lambda: preflight_versions.versions(recipe),
        preflight_shards.CHECK: shards,
        preflight_space.CHECK: space,
    }


def run_checks(checks: Mapping[str, Callable[[], Any]], limit: float) -> dict[str, dict[str, Any]]:
    """Runs each check, at most so many seconds: its "result", or its "problem" in words."""
    found: dict[str, dict[str, Any]] = {}
    for name, check in checks.items():
        began = time.monotonic()
        result = problem = None
        try:
            result = within(limit, check)
        except TimeoutError:
            problem = f"did not end within {limit:.0f} s"
        except Exception as error:  # of whatever kind: it is told, and the other ranks go on
            problem = f"failed: {' '.join(str(error).split()) or type(error).__name__}"
        found[name] = {"result": result, "problem": problem, "seconds": time.monotonic() - began}
    return found


def judge_local(found: Preflight, reports: Mapping[int, Any]) -> None:
    """Takes over what the ranks found out alone, and judges it."""
    nodes, results = found.nodes, {}
    for check in reports[0]:
        rows = {rank: report[check] for rank, report in reports.items()}
        found.seconds[check] = max(row["seconds"] for row in rows.values())
        failed = {rank: f"the check {row['problem']}" for rank, row in rows.items() if row["problem"] is not None}
        severity = severity_of({nodes[rank] for rank in failed}, nodes)
        found.findings += findings_of(nodes, check, failed, "Look at that machine.", severity)
        results[check] = {rank: row["result"] for rank, row in rows.items() if row["result"] is not None}

    found.devices = {rank: Device(**one) for rank, one in results[preflight_device.CHECK].items()}
    found.smi = {nodes[rank]: Smi(**one) for rank, one in results[preflight_device.SMI_CHECK].items()}
    found.findings += preflight_device.judge_devices(found.devices, found.smi, nodes)

    versions = results[preflight_versions.CHECK]
    drivers = {node: smi.driver for node, smi in found.smi.items() if smi.driver is not None}
    found.versions = versions.get(0, {}) | ({"driver": drivers[nodes[0]]} if nodes[0] in drivers else {})
    found.findings += preflight_versions.judge_versions(versions, drivers, nodes)

    shards = {
        rank: {path: Shards(**one) for path, one in row.items()}
        for rank, row in results[preflight_shards.CHECK].items()
    }
    for row in shards.values():
        for path, one in row.items():
            found.shards[path] = found.shards.get(path, 0) + one.read
    found.findings += preflight_shards.judge_shards(shards, nodes)

    space = results[preflight_space.CHECK]
    shared = {rank: row["shared"] for rank, row in space.items() if row["shared"] is not None}
    found.shared_memory = {nodes[rank]: size for rank, size in shared.items()}
    own = space.get(0, {})
    found.disk = Disk(**own["disk"]) if "disk" in own else None
    if "unknown" in own:
        problem = f"{own['unknown']}. See to it, or mind the space yourself."
        found.findings.append(Finding(nodes[0], 0, preflight_space.CHECK, problem, "note"))
    found.findings += preflight_space.judge_space(found.disk, shared, own.get("worker"), nodes)


def judge_clocks(found: Preflight, skews: Mapping[int, Skew]) -> None:
    """Takes over how far the clocks are apart; a clear difference is a note."""
    nodes = found.nodes
    usual = statistics.median(one.ahead for one in skews.values())
    from_usual = {rank: Skew(one.ahead - usual, one.within) for rank, one in skews.items()}
    for rank, one in sorted(from_usual.items(), key=lambda item: abs(item[1].ahead)):
        found.skew[nodes[rank]] = one  # of a node's ranks the one that is farthest
    wrong = {
        rank: f"the clock is {abs(one.ahead):.1f} s {'ahead' if one.ahead > 0 else 'behind'}"
        for rank, one in sorted(from_usual.items())
        if abs(one.ahead) - one.within > MOST_SKEW
    }
    remedy = "Have the clocks set (chrony or ntpd): times in logs and of files do not compare."
    found.findings += findings_of(nodes, CLOCK, wrong, remedy, "note")


def judge_silent(silent: Sequence[int], nodes: Sequence[str]) -> list[Finding]:
    """Names the nodes of ranks that do not answer; if these are most, rank 0 is the one that hears nobody."""
    names = {nodes[rank] for rank in silent}
    remedy = "It was stopped, hangs or has lost its network: look at that machine."
    if len(names) > 1 and 2 * len(names) > len(set(nodes)):
        return [Finding(nodes[0], 0, SILENT, f"hears nothing of {spell(sorted(names))}. {remedy}", "bad node")]
    text = f"does not answer (rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent))})"
    return [
        Finding(node, None, SILENT, f"{text}. {remedy}", "stop" if node == UNKNOWN else "bad node")
        for node in dict.fromkeys(nodes[rank] for rank in silent)
    ]


def without_rank_zero(found: Preflight, run: RunDirectory) -> Preflight:
    """What the others say if rank 0 does not answer; the first of them writes it."""
    nodes = found.nodes
    alone = Preflight(number=found.number, nodes=nodes, findings=judge_silent([0], nodes), silent=[0])
    others = [rank for rank, node in enumerate(nodes) if rank and node != nodes[0]] or [1]
    if dist.get_rank() == others[0]:
        write(alone, run)
    return alone


def write(found: Preflight, run: RunDirectory) -> None:
    """slurm/preflight.json, if the disk lets it be written: what it refuses was found by a check. If it holds a verdict
    on this preflight already, that stays: then the process was suspended for long, and others have gone on.
    """

    def action() -> None:
        path = run.path / "slurm" / "preflight.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError, ValueError):
            if Preflight.model_validate_json(path.read_bytes()).number == found.number:
                return
        temporary = path.with_name(f"{path.name}.{dist.get_rank()}")
        temporary.write_text(found.model_dump_json(indent=1))
        temporary.replace(path)

    with contextlib.suppress(OSError, TimeoutError):
        within(GRACE, action)
