"""Tiny runs submitted to the test cluster: started, watched, compared."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_train.recipe import write_recipe
from slurm.record import Attempt, LaunchRecord, Submission
from slurm.settings import LaunchSettings
from slurm.submit import Request, submit_run
from tests import tiny
from tests.faults.rounds import outcome

LIMIT = 240.0  # seconds for anything to happen
NODES: dict[str, Any] = {"nodes": "2", "gpus_per_node": 1, "cpus_per_rank": 1, "time": "20:00", "preflight": False}


def write_tiny(folder: Path, *, epochs: int = 12, **training: Any) -> Path:
    """A recipe of 10 steps an epoch that saves every fifth and validates every second, which takes its time."""
    made = tiny.recipe(
        tiny.write_corpus(folder / "shards", train=60),
        training={"epochs": epochs, "validate_every": 2, **training},
        checkpoint={"every_steps": 5, "keep_last": 3},
        data={"workers": 1},
    )
    write_recipe(made, folder / "recipe.yaml")
    return folder / "recipe.yaml"


class SubmittedRun:
    """A run on the cluster.

    Args:
        recipe: of the run.
        output: the run directory to make.
        settings: differing from one rank on each of two nodes.
    """

    def __init__(self, recipe: Path, output: Path, *overrides: str, **settings: Any) -> None:
        self.output = output
        self.record = LaunchRecord(output)
        request = Request(recipe, list(overrides), output, LaunchSettings.model_validate({**NODES, **settings}))
        submission = submit_run(request, lambda text: None)
        assert isinstance(submission, Submission)
        self.job = submission.job

    @property
    def attempts(self) -> list[Attempt]:
        """All attempts so far."""
        return self.record.read_attempts()

    @property
    def step(self) -> int:
        """The last step that was logged."""
        try:
            rows = [json.loads(line) for line in (self.output / "metrics.jsonl").read_text().splitlines()]
        except (OSError, ValueError):
            return 0
        return max((int(row["step"]) for row in rows), default=0)

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """The lines of that kind in metrics.jsonl."""
        rows = [json.loads(line) for line in (self.output / "metrics.jsonl").read_text().splitlines()]
        return [row for row in rows if row["kind"] == kind]

    def wait(self, what: str, condition: Callable[[], Any], limit: float = LIMIT) -> None:
        """Waits until it is so.

        Raises:
            AssertionError: with all that the job has printed.
        """
        deadline = time.monotonic() + limit
        while not condition():
            assert time.monotonic() < deadline, f"{what} never came\n{self.printed()}"
            time.sleep(0.1)

    def wait_step(self, step: int, *, attempt: int = 0) -> None:
        """Waits until that attempt has made that many steps more than it began with."""
        self.wait(f"attempt {attempt}", lambda: len(self.attempts) > attempt)
        goal = self.attempts[attempt].first_step + step
        started = self.attempts[attempt].started
        metrics = self.output / "metrics.jsonl"
        self.wait(
            f"step {goal}",
            lambda: (
                self.step >= goal
                and metrics.stat().st_mtime > started
                and (self.output / "logs/heartbeat.json").exists()
            ),
        )

    def wait_attempt(self, number: int) -> Attempt:
        """Waits until the job has started again `number` times."""
        self.wait(f"attempt {number}", lambda: len(self.attempts) > number)
        return self.attempts[number]

    def wait_end(self) -> Attempt:
        """Waits until it is decided that the run is done, or given up."""
        self.wait("the end", lambda: self.attempts and self.attempts[-1].decision in ("done", "stop"))
        return self.attempts[-1]

    def result(self) -> dict[str, Any]:
        """Losses, predictions and weights of the finished run, bit by bit."""
        last = self.wait_end()
        assert last.decision == "done", f"{last.reason}\n{self.printed()}"
        return outcome(self.output)

    def signal_rank(self, rank: int, number: signal.Signals) -> None:
        """A signal to a rank, whatever node it is on: found by its environment, which its data workers share."""
        wanted = {f"SLURM_JOB_ID={self.job}".encode(), f"SLURM_PROCID={rank}".encode()}
        wanted.add(f"SLURM_CONF={os.environ['SLURM_CONF']}".encode())
        parents = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                variables = (process / "environ").read_bytes().split(b"\0")
                command = (process / "cmdline").read_bytes()
                parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if wanted.issubset(variables) and b"submitit.core._submit" in command:
                parents[int(process.name)] = parent
        (found,) = (process for process, parent in parents.items() if parent not in parents)
        os.kill(found, number)

    def printed(self) -> str:
        """What the job has printed."""
        texts = [f"{path.name}:\n{path.read_text()[-3000:]}" for path in sorted(self.record.jobs.glob("*/*_log.*"))]
        return "\n".join([*texts, *(attempt.model_dump_json() for attempt in self.attempts)])


def same(result: dict[str, Any], reference: dict[str, Any]) -> bool:
    """Whether two runs ended with the same, naming what differs."""
    different = [key for key in reference if result.get(key) != reference[key]]
    assert not different and result.keys() == reference.keys(), different[:5]
    return True
