"""What a preflight found, for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from rich.console import Group
from rich.table import Table
from rich.text import Text

from dist_train.plan_table import size
from slurm.preflight import device as preflight_device
from slurm.preflight import directory as preflight_directory
from slurm.preflight import shards as preflight_shards
from slurm.preflight import space as preflight_space
from slurm.preflight import versions as preflight_versions
from slurm.preflight.examine import CLOCK, Preflight
from slurm.preflight.findings import Finding
from slurm.preflight.tournament import CHECK as NETWORK

STYLES = {"bad node": "red", "stop": "red", "note": "yellow"}


def preflight_table(found: Preflight, *, only_notes: bool = False) -> Group:
    """One row per check with what was measured, and a line per finding.

    Args:
        only_notes: no lines for what is told as an error.
    """
    nodes = len(set(found.nodes))
    title = f"Preflight of {len(found.nodes)} ranks on {nodes} node{'s' * (nodes > 1)}"
    table = Table(title=f"{title}, {found.seconds.get('all', 0):.1f} s", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    table.add_column("check")
    table.add_column("s", justify="right")
    table.add_column("found", overflow="fold")
    worst = {}
    for one in found.findings:
        if STYLES[one.severity] == "red" or one.check not in worst:
            worst[one.check] = one.severity
    for check, text in rows(found):
        severity = worst.get(check)
        mark = Text("✓", "green") if severity is None else Text("!" if severity == "note" else "✗", STYLES[severity])
        seconds = found.seconds.get(check)
        table.add_row(mark, check, "" if seconds is None else f"{seconds:.1f}", Text(text))
    shown = [one for one in found.findings if one.severity == "note" or not only_notes]
    return Group(table, *map(line, shown))


def line(finding: Finding) -> Text:
    """A finding."""
    rank = "" if finding.rank is None else f", rank {finding.rank}"
    return Text.assemble(
        (f"{finding.severity}: ", STYLES[finding.severity]),
        f"{finding.node}{rank}: {finding.check}: {finding.problem}",
    )


def rows(found: Preflight) -> Iterator[tuple[str, str]]:
    """Of each check that was made, what it measured."""
    if found.devices:
        kinds = Counter(one.name for one in found.devices.values())
        flops = sorted(one.flops / 1e12 for one in found.devices.values())
        names = ", ".join(f"{count} × {name}" for name, count in kinds.items())
        yield preflight_device.CHECK, f"{names}, {flops[0]:.3g} to {flops[-1]:.3g} TFLOP/s"
    if found.versions:
        yield preflight_versions.CHECK, ", ".join(f"{k} {v}" for k, v in found.versions.items() if v != "none")
    for path, count in found.shards.items():
        yield preflight_shards.CHECK, f"{path}: {count} samples read"
    shared = min(found.shared_memory.values(), default=None)
    parts = []
    if found.disk is not None:
        parts.append(f"{size(found.disk.free)} free for checkpoints of {size(found.disk.checkpoint)}")
    if shared is not None:
        parts.append(f"/dev/shm {size(shared)}")
    if parts:
        yield preflight_space.CHECK, ", ".join(parts)
    if preflight_directory.CHECK in found.seconds:
        wrong = any(one.check == preflight_directory.CHECK for one in found.findings)
        yield preflight_directory.CHECK, "not the same on all nodes" if wrong else "written and read by all nodes"
    if found.skew:
        most = max(found.skew.values(), key=lambda one: abs(one.ahead))
        yield CLOCK, f"at most {abs(most.ahead):.3f} ± {most.within:.3f} s apart from the median"
    if found.network is not None:
        yield NETWORK, "; ".join(network(found))


def network(found: Preflight) -> Iterator[str]:
    """What was measured of the network."""
    measured = found.network
    assert measured is not None
    if measured.links:
        speeds = sorted(link.bytes_per_second / 1e9 for link in measured.links)
        latency = 1e6 * max(link.seconds for link in measured.links)
        yield f"{len(speeds)} pairs of nodes {speeds[0]:.3g} to {speeds[-1]:.3g} GB/s, latency up to {latency:.0f} µs"
    if measured.inside:
        slowest = min(measured.inside.values(), key=lambda one: one.bytes_per_second)
        yield f"pairs of ranks of a node from {slowest.bytes_per_second / 1e9:.3g} GB/s"
    if measured.all_reduce_of_node:
        slow = min(rate.bytes_per_second for rate in measured.all_reduce_of_node.values())
        yield f"all-reduce in a node from {slow / 1e9:.3g} GB/s"
    if measured.all_reduce is not None:
        rate = measured.all_reduce
        yield f"of all ranks {rate.bytes_per_second / 1e9:.3g} GB/s, latency {1e6 * rate.seconds:.0f} µs"
    done, planned = measured.rounds
    if done < planned:
        yield f"time for {done} of {planned} rounds of pairs"
