"""Where the time goes from `dist-train submit` to the first step, and from a preemption to the next one.

    python -m tests.slurm.cluster run python -m tests.bench.submit

Slurm's share is what it waits by its settings: before a requeued job may start again (cred_expire) 8 s on the test
cluster, two minutes on most others. Ours is all else.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from slurm.queue import job_state
from tests.slurm.runs import SubmittedRun, write_tiny


def until(condition: Callable[[], Any]) -> float:
    """Seconds since the epoch when it became so."""
    while not condition():
        time.sleep(0.02)
    return time.time()


def first_row(path: Path, after: float) -> float:
    """When the first step after that time was logged."""
    return (
        until(lambda: path.is_file() and path.stat().st_mtime > after and path.stat().st_size) and path.stat().st_mtime
    )


def measure(folder: Path, nodes: int) -> list[tuple[str, str, float]]:
    """Rows of (whose time, what, seconds) of a submission, and of a preemption."""
    recipe = write_tiny(folder, epochs=1000)
    began = time.time()
    run = SubmittedRun(recipe, folder / "run", nodes=str(nodes), preflight=True)
    metrics = run.output / "metrics.jsonl"
    queued = time.time()
    running = until(lambda: job_state(run.job).state == "RUNNING")
    started = run.wait_attempt(0).started
    stepped = first_row(metrics, started)
    rows = [
        ("ours", "submit: check, freeze, sbatch", queued - began),
        ("Slurm", "submit: waiting for nodes", running - queued),
        ("ours", "submit: batch script, srun, python in every rank", started - running),
        ("ours", "submit: imports, preflight, models, first step", stepped - started),
    ]
    run.wait_step(5)
    asked = time.time()
    subprocess.run(
        ["sbatch", "--partition=high", f"--nodes={nodes}", "--exclusive", "--output=/dev/null", "--wrap=true"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    until(lambda: run.attempts[0].outcome == "stopped")
    saved = run.attempts[0].ended or 0.0
    pending = until(lambda: job_state(run.job).state == "PENDING")
    running = until(lambda: job_state(run.job).state == "RUNNING")
    started = run.wait_attempt(1).started
    stepped = first_row(metrics, started)
    rows += [
        ("ours", "preemption: signal, step to its end, save, ranks end", saved - asked),
        ("Slurm", "preemption: requeue", pending - saved),
        ("Slurm", "preemption: the other job, wait before a requeued job may start", running - pending),
        ("ours", "preemption: batch script, srun, python in every rank", started - running),
        ("ours", "preemption: imports, preflight, models, checkpoint, first step", stepped - started),
    ]
    subprocess.run(["scancel", run.job], check=False)
    return rows


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), given.nodes)
    table = Table("what", "Slurm, s", "ours, s", title=f"{given.nodes} nodes, one rank each")
    for whose, what, seconds in rows:
        table.add_row(what, *([f"{seconds:.1f}", ""] if whose == "Slurm" else ["", f"{seconds:.1f}"]))
    for what in ("submit", "preemption"):
        sums = [
            sum(row[2] for row in rows if row[0] == whose and row[1].startswith(what)) for whose in ("Slurm", "ours")
        ]
        table.add_section()
        table.add_row(f"{what}, together", *(f"{total:.1f}" for total in sums))
    Console().print(table)


if __name__ == "__main__":
    main()
