"""A submitted run on this machine alone: the ranks are local processes, and what happens after an attempt is decided as
on a cluster. The object is what Submitit's local executor runs in the background.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from sharding.launch import run_ranks
from slurm.aftermath import outcome_of
from slurm.job import LOCAL_JOB, LOCAL_RESTART, saved_step
from slurm.record import Attempt, LaunchRecord
from slurm.restart import decide


@dataclass(frozen=True)
class LocalJob:
    """Trains on this machine until the run is done or given up.

    Args:
        run: the run directory, absolute.
    """

    run: str

    def __call__(self) -> int:
        """Returns the exit code."""
        record = LaunchRecord(Path(self.run))
        settings = record.read_launch().settings
        job = str(os.getppid())  # Submitit's controller, by whose process id it names the job
        attempts: list[Attempt] = []
        while True:
            restart = len(attempts)
            os.environ.update({LOCAL_JOB: job, LOCAL_RESTART: str(restart)})
            print(f"dist-train: attempt {restart} on {platform.node()}", file=sys.stderr, flush=True)
            begun = Attempt(
                job=job, restart=restart, started=time.time(), nodes=[platform.node()], ranks=settings.ranks,
                first_step=saved_step(record.run),
            )  # fmt: skip
            code, _ = run_ranks(
                [sys.executable, "-m", "slurm.job", self.run], settings.ranks, record.reports(job, restart)
            )
            ended = outcome_of(record, begun, code, errors="")
            attempts.append(ended)
            # Nobody but the user stops a local run.
            decision = decide(attempts, settings, cancelled=record.cancelled.exists() or ended.outcome == "stopped")
            record.add_attempt(ended.model_copy(update={"decision": decision.action, "reason": decision.reason}))
            print(f"dist-train: {decision.action}: {decision.reason}", file=sys.stderr, flush=True)
            if decision.action != "requeue":
                return 0 if decision.action == "done" else code or 1
