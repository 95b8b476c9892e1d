"""What a check of the machines finds, and whose fault it is: one node's, or something a user has to mend."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

SHOWN_NODES = 4  # names in a message
NETWORK_FILE_SYSTEMS = frozenset(
    (
        *("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "fuse.ceph", "wekafs", "glusterfs", "fuse.glusterfs"),
        *("pvfs2", "panfs", "afs", "cifs", "smb3", "9p", "virtiofs", "fuse.juicefs", "fuse.sshfs"),
    )
)

Severity = Literal["bad node", "stop", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing that a check found.

    Args:
        node: where; of several, the first.
        rank: whose, if it concerns one rank.
        check: which check found it.
        problem: what is wrong; its last sentence says what to do.
        severity: `bad node`: run elsewhere without that node; `stop`: a user has to act; `note`: only told.
    """

    node: str
    rank: int | None
    check: str
    problem: str
    severity: Severity


def severity_of(failing: Collection[str], nodes: Collection[str], file_system: str | None = None) -> Severity:
    """Whose fault it is that some nodes fail: theirs if they are few.

    Args:
        failing: names of the nodes that fail.
        nodes: of all.
        file_system: of a place that the failing nodes do not see, as the others see it. On a network file system it
            is the failing nodes' mount that is wrong however many they are; on a local one the user's choice of place.
    """
    bad, every = len(set(failing)), len(set(nodes))
    if bad < every and (2 * bad < every or file_system in NETWORK_FILE_SYSTEMS):
        return "bad node"
    return "stop"


def findings_of(
    nodes: Sequence[str], check: str, problems: Mapping[int, str], remedy: str, severity: Severity
) -> list[Finding]:
    """The problems of ranks, equal ones told once: per node if the nodes are to be left out, else once at all.

    Args:
        nodes: name of the node of each rank.
        problems: of the ranks that have one.
    """
    ranks: dict[tuple[str, str], list[int]] = {}
    for rank, text in sorted(problems.items()):
        ranks.setdefault((text, nodes[rank] if severity == "bad node" else ""), []).append(rank)
    found = []
    for (text, _), those in ranks.items():
        names = [nodes[rank] for rank in those]
        where = "" if len(set(names)) == 1 else f" (on {spell(names)})"
        alone = those[0] if len(those) == 1 else None
        found.append(Finding(names[0], alone, check, f"{text}{where}. {remedy}", severity))
    return found


def spell(names: Sequence[str]) -> str:
    """Different names in their order: `node1, node2 and 3 more`."""
    different = list(dict.fromkeys(names))
    more = len(different) - SHOWN_NODES
    return ", ".join(different[:SHOWN_NODES]) + (f" and {more} more" if more > 0 else "")


def first_ranks(nodes: Sequence[str]) -> dict[str, int]:
    """The first rank of each node."""
    first: dict[str, int] = {}
    for rank, node in enumerate(nodes):
        first.setdefault(node, rank)
    return first
