"""A submitted run on this machine alone: the ranks are local processes, and what happens after an attempt is decided as
on a cluster. The object is what Submitit's local executor runs in the background.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import submitit

from sharding.errors import UserError
from sharding.launch import run_ranks
from slurm.aftermath import outcome_of
from slurm.ask import ask
from slurm.chain import ChainJob
from slurm.job import LOCAL_JOB, LOCAL_RESTART, saved_step
from slurm.record import Attempt, LaunchRecord
from slurm.restart import decide

FOREVER = 60 * 24 * 365  # minutes: a local job has no time limit
SECONDS = 60.0  # to start one


@dataclass(frozen=True)
class LocalJob:
    """Trains on this machine until the run is done or given up, and carries out the commands that follow.

    Args:
        run: the run directory, absolute.
    """

    run: str

    def __call__(self) -> int:
        """Returns the exit code."""
        job = str(os.getppid())  # Submitit's controller, by whose process id it names the job
        code = self.train(job)
        chain = LaunchRecord(Path(self.run)).read_launch().chain
        while chain and not code:
            words = tuple(chain.pop(0))
            code = ChainJob(self.run, words).carry_out(job)
        return code

    def train(self, job: str) -> int:
        """Returns the exit code of the training."""
        record = LaunchRecord(Path(self.run))
        settings = record.read_launch().settings
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


def start_local(record: LaunchRecord, folder: Path) -> str:
    """Starts a `LocalJob` in the background, with the code as submitted. Returns its job id.

    Raises:
        UserError: it cannot be started.
    """
    command = [sys.executable, "-c", "import slurm.local; slurm.local.begin()", str(record.run), str(folder)]
    # In a session of its own: neither Ctrl-C nor the end of the terminal reaches it.
    done = subprocess.run(
        command,
        env=frozen(record.code, record.read_launch().settings.environment),
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    if done.returncode or not done.stdout.isdecimal():
        said = " ".join(done.stderr.split())[-300:]
        raise UserError("--cluster local", f"the job cannot be started ({said})", "Mend that, and submit again.")
    return done.stdout


def begin() -> None:
    """The process that starts a job, prints its id and ends."""
    run, folder = sys.argv[1:]
    told, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in range(3):  # whoever waits for this process's output must not wait for the job's end
        os.dup2(null, stream)
    settings = LaunchRecord(Path(run)).read_launch().settings
    job = submit_local(run, Path(folder), visible_gpus()[: settings.ranks] if settings.gpus_per_node else [])
    os.write(told, job.job_id.encode())


def submit_local(run: str, folder: Path, gpus: Sequence[int]) -> submitit.Job[int]:
    """Starts a `LocalJob` as a child of this process.

    Args:
        gpus: which it may use.
    """
    executor = submitit.LocalExecutor(folder)
    executor.update_parameters(timeout_min=FOREVER, gpus_per_node=len(gpus), visible_gpus=tuple(gpus))
    return executor.submit(LocalJob(run))


def frozen(code: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """What a batch script would export: the launch file's variables; Python takes the packages from the frozen code."""
    variables = {**os.environ, **environment}
    paths = [str(code), *filter(None, [variables.get("PYTHONPATH")])]
    return {**variables, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}


def visible_gpus() -> list[int]:
    """Numbers of the GPUs that this process may use."""
    found, text = ask(["nvidia-smi", "--list-gpus"], 20.0)
    present = dict(re.findall(r"^GPU (\d+): .*\(UUID: ([\w-]+)\)", text, re.MULTILINE)) if found else {}
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return list(map(int, present))
    words = [word.strip() for word in named.split(",")]
    return [int(number) for word in words for number, name in present.items() if word and word in (number, name)]
