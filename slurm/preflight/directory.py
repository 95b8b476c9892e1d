"""Whether every rank sees the run directory that rank 0 sees, and every node can write there."""

from __future__ import annotations

import contextlib
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_train.run_directory import RunDirectory
from slurm.preflight.exchange import GRACE, Exchange, within
from slurm.preflight.findings import Finding, findings_of, first_ranks, severity_of
from slurm.preflight.shards import file_system_of

CHECK = "run directory"
APPEARS = 3.0  # seconds within which a file must be seen by other nodes
REMEDY = "Give an --output that all nodes share and may write to."


def check_directory(exchange: Exchange, run: RunDirectory, nodes: Sequence[str], limit: float) -> list[Finding]:
    """Rank 0 writes a file and all ranks read it; the first rank of each node writes one and rank 0 reads it
    (collective). Returns the findings, in rank 0.

    Args:
        nodes: name of the node of each rank.
        limit: seconds for each rank's part.
    """
    token = uuid.uuid4().hex
    problem = bounded(limit, lambda: begin(run, token)) if exchange.rank == 0 else None
    token, problem = exchange.report(None, lambda _: (token, problem), limit)
    if problem is not None:
        return [Finding(nodes[0], None, CHECK, f"{run.path} {problem}. {REMEDY}", "stop")]
    folder = folder_of(run, token)
    found: dict[str, Any] = {
        "system": file_system_of(run.path),
        "sees": bounded(limit / 2, lambda: look(folder / "rank_0", token)),
        "writes": None,
    }
    if found["sees"] is None and first_ranks(nodes)[nodes[exchange.rank]] == exchange.rank:
        found["writes"] = bounded(limit / 2, lambda: write(folder / f"rank_{exchange.rank}", token))
    findings: list[Finding] = []

    def decide(reports: dict[int, Any]) -> None:
        findings.extend(judge_directory(run, reports, unseen(folder, token, reports, nodes), nodes))
        with contextlib.suppress(TimeoutError, OSError):
            within(GRACE, lambda: shutil.rmtree(folder, ignore_errors=True))

    exchange.report(found, decide, limit)
    return findings


def begin(run: RunDirectory, token: str) -> str | None:
    """Makes the folder and rank 0's file; returns what is wrong."""
    folder = folder_of(run, token)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        return f"cannot be written to ({error.strerror or error})"
    return write(folder / "rank_0", token)


def folder_of(run: RunDirectory, token: str) -> Path:
    """Where the files of this run of the check lie."""
    return run.path / "slurm" / f"preflight_{token}"


def write(path: Path, token: str) -> str | None:
    """Writes a file; returns what is wrong."""
    try:
        path.write_text(token)
    except OSError as error:
        return f"cannot be written to ({error.strerror or error})"
    return None


def look(path: Path, token: str) -> str | None:
    """Waits until a file is seen; returns what is wrong."""
    ends = time.monotonic() + APPEARS
    while True:
        try:
            text = path.read_text()
            if text == token:
                return None
            problem = "shows another content of a file than was written"
        except FileNotFoundError:
            problem = "does not show what was written there"
        except OSError as error:
            problem = f"cannot be read ({error.strerror or error})"
        if time.monotonic() > ends:
            return problem
        time.sleep(0.05)


def bounded(seconds: float, action: Any) -> str | None:
    """What `action` returns, or that it did not end."""
    try:
        return within(seconds, action)
    except TimeoutError:
        return f"does not answer within {seconds:.0f} s"
    except Exception as error:
        return f"cannot be used ({error})"


def unseen(folder: Path, token: str, reports: Mapping[int, Any], nodes: Sequence[str]) -> list[int]:
    """First ranks of nodes that have written what rank 0 does not see."""
    wrote = [rank for rank in first_ranks(nodes).values() if rank in reports]
    wrote = [rank for rank in wrote if reports[rank]["sees"] is None and reports[rank]["writes"] is None]
    ends = time.monotonic() + APPEARS
    missing = wrote
    while missing and time.monotonic() < ends:
        missing = [rank for rank in missing if bounded(1.0, lambda: read(folder, rank)) != token]  # noqa: B023  run at once
    return missing


def read(folder: Path, rank: int) -> str | None:
    """What a rank has written, if it is seen."""
    try:
        return (folder / f"rank_{rank}").read_text()
    except OSError:
        time.sleep(0.05)
        return None


def judge_directory(
    run: RunDirectory, reports: Mapping[int, Any], missing: Sequence[int], nodes: Sequence[str]
) -> list[Finding]:
    """Findings about the run directory.

    Args:
        reports: of each rank: "sees" and "writes", what is wrong or None; "system", kind of its file system.
        missing: ranks whose file rank 0 does not see.
        nodes: name of the node of each rank.
    """
    system = reports[0]["system"]
    problems = {}
    for rank, one in reports.items():
        kinds = f" ({one['system']}{f' here, {system} there' if one['system'] != system else ''})"
        if one["sees"] is not None:
            problems[rank] = f"{run.path} {one['sees']} by rank 0 on {nodes[0]}{kinds}"
        elif one["writes"] is not None:
            problems[rank] = f"{run.path} {one['writes']}{kinds}"
        elif rank in missing:
            problems[rank] = f"{run.path} does not show on {nodes[0]} what was written here{kinds}"
    return findings_of(nodes, CHECK, problems, REMEDY, severity_of({nodes[rank] for rank in problems}, nodes, system))
