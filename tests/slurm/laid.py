"""Run directories laid by hand, as `submit`, the ranks and the batch script would write them."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import yaml

from slurm.record import Attempt, Failure, LaunchRecord, Submission
from slurm.settings import LaunchSettings

JOB = "123456"
# Of an attempt whose rank 3 was killed, and that is to start again.
AGAIN: dict[str, Any] = {
    "outcome": "failed",
    "last_step": 7,
    "failures": [Failure(rank=3, node="n2", error="Killed")],
    "decision": "requeue",
    "reason": "Killed",
    "ended": 1,
}


class Laid:
    """A run directory.

    Args:
        path: to make.
        recipe: keys of `training`.
    """

    def __init__(self, path: Path, **recipe: Any) -> None:
        self.path, self.record = path, LaunchRecord(path)
        (path / "logs").mkdir(parents=True)
        (path / "recipe.yaml").write_text(yaml.safe_dump({"training": {"epochs": 4, **recipe}}))
        age(path / "recipe.yaml", 3600)

    def submitted(self, job: str, *, ago: float = 100, cluster: str = "slurm", **more: Any) -> Submission:
        """A `submit`, some seconds ago."""
        given: dict[str, Any] = {
            "cluster": cluster,
            "job": job,
            "submitted": time.time() - ago,
            "host": platform.node(),
            "command": f"dist-train submit r.yaml --output {self.path}",
            "settings": LaunchSettings(signal_seconds=30),
            **more,
        }
        submission = Submission(**given)
        self.record.add_submission(submission)
        return submission

    def attempt(self, job: str, restart: int = 0, *, ago: float = 50, **more: Any) -> Attempt:
        """An attempt of four ranks on two nodes, begun some seconds ago."""
        given: dict[str, Any] = {"nodes": ["n1", "n2"], "ranks": 4, "first_step": 0, **more}
        attempt = Attempt(job=job, restart=restart, started=time.time() - ago, **given)
        self.record.add_attempt(attempt)
        return attempt

    def steps(self, count: int, *, total: int = 100, seconds: float = 0.5, **more: Any) -> None:
        """Step lines of metrics.jsonl, the last just now."""
        with (self.path / "metrics.jsonl").open("a") as file:
            for step in range(1, count + 1):
                row = {"kind": "step", "step": step, "total_steps": total, "epoch": 4 * (step - 1) // total}
                file.write(json.dumps({**row, "loss": 1 / step, "clips": 8, "step_seconds": seconds, **more}) + "\n")

    def beats(self, *processes: str, phase: str = "forward", step: int = 1, ago: float = 0, **more: Any) -> None:
        """heartbeat.json of ranks that are these processes."""
        places = [
            {"count": 0, "phase": phase, "step": step, "waits": False, "module": None, "idle": 0.1, "turn": 9,
             "process": process, **more}
            for process in processes
        ]  # fmt: skip
        (self.path / "logs/heartbeat.json").write_text(json.dumps(places))
        age(self.path / "logs/heartbeat.json", ago)

    def saved(self, step: int) -> None:
        """A checkpoint."""
        folder = self.path / f"checkpoints/step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        (self.path / "checkpoints/last").symlink_to(folder.name)

    def finished(self, *, ago: float = 0) -> None:
        """summary.json."""
        (self.path / "summary.json").write_text("{}")
        age(self.path / "summary.json", ago)

    def reported(self, job: str, restart: int, rank: int, *rows: list[str]) -> None:
        """What a rank told the launcher."""
        folder = self.record.reports(job, restart)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank_{rank}.error.json").write_text(json.dumps(rows))

    def log(self, job: str, rank: int, stream: str, text: str, *, folder: int = 1) -> Path:
        """More output of a rank."""
        path = self.record.jobs / str(folder) / f"{job}_{rank}_log.{stream}"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(text)
        return path


def age(path: Path, seconds: float) -> None:
    """Has the file be that old."""
    when = time.time() - seconds
    os.utime(path, (when, when))


def here(pid: int) -> str:
    """A process of this machine, as heartbeats name it."""
    return f"{platform.node()}:{pid}"
