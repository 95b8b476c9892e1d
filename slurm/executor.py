"""The batch script and its submission, through Submitit."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor, SlurmJob

from sharding.errors import UserError
from slurm.job import DEADLINE
from slurm.settings import LaunchSettings
from slurm.watcher import QueueWatcher

SlurmJob.watcher = QueueWatcher(delay_s=10)  # of all jobs that Submitit submits from here

# Of a message of sbatch: what to do about it.
REMEDIES = {
    "partition": "Give a --partition that `sinfo -s` shows.",
    "account": "Give an --account of yours (sacctmgr show associations user=$USER).",
    "qos": "Give a --qos of yours (sacctmgr show associations user=$USER format=account,qos).",
    "time limit": "Give a shorter --time; the run is requeued until it is done.",
    "node count": "Give fewer --nodes.",
    "configuration is not available": "Ask for what a node has (--gpus-per-node, --cpus-per-rank, --memory).",
    "feature": "Give a --constraint that `sinfo -o %f` shows.",
    "reservation": "Give a --reservation that `scontrol show reservation` shows.",
    "contact": "Check that slurmctld runs and SLURM_CONF is right (scontrol ping), then try again.",
}


def slurm_executor(
    code: Path, run: str, settings: LaunchSettings, folder: Path, name: str, *, dependency: str | None = None
) -> SlurmExecutor:
    """Submitit's executor for a training job, which keeps its pickles and the ranks' logs in `folder`.

    Args:
        code: the packages, as submitted.
        run: the run directory, as a word of the batch script.
    """
    executor = plain_executor(settings, folder, name, dependency=dependency)
    executor.update_parameters(
        setup=setup(code, settings), teardown=[f"exec {shlex.quote(sys.executable)} -m slurm.aftermath {run} $?"]
    )
    return executor


def plain_executor(
    settings: LaunchSettings, folder: Path, name: str, *, dependency: str | None = None
) -> SlurmExecutor:
    """An executor that asks for what the settings say, and does nothing before and after srun.

    Ranks per node are told to srun, not to sbatch: from `--ntasks-per-node` sbatch would fix the job's number of tasks
    at its first start, and with it, for good, the number of nodes out of a range.
    """
    executor = SlurmExecutor(folder=folder)
    cpus = settings.ranks * settings.cpus_per_rank
    wanted: dict[str, Any] = {
        **settings.sbatch,
        "nodes": settings.nodes,
        "mincpus": str(cpus),
        "time": settings.time,
        "requeue": True,  # a site's default may be that nothing is requeued
        **({"mem": settings.memory} if settings.memory is not None else {}),
        **({"reservation": settings.reservation} if settings.reservation else {}),
    }
    wanted["kill-on-invalid-dep"] = "yes"  # else a job whose predecessor failed waits for ever
    executor.update_parameters(
        job_name=name,
        signal_delay_s=settings.signal_seconds,
        additional_parameters=wanted,
        srun_args=[
            f"--ntasks-per-node={settings.ranks}",
            f"--cpus-per-task={settings.cpus_per_rank}",  # srun before 23.11 does not take it from sbatch
            "--kill-on-bad-exit=1",
            *settings.srun,
        ],
        **optional(settings, dependency),
    )
    return executor


def optional(settings: LaunchSettings, dependency: str | None) -> dict[str, Any]:
    """Options of sbatch that are left out where they are not set."""
    given = {
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "exclude": settings.exclude,
        "dependency": dependency,
        "gpus_per_node": settings.gpus_per_node or None,
        "exclusive": settings.exclusive or None,
    }
    return {key: value for key, value in given.items() if value is not None}


def surroundings(code: Path, settings: LaunchSettings) -> list[str]:
    """Lines of a batch script that set up the environment, with the code as submitted."""
    return [
        *(f"export {key}={shlex.quote(value)}" for key, value in settings.environment.items()),
        *settings.setup,
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export PYTHONSAFEPATH=1  # else a checkout that is the working directory comes first",
    ]


def setup(code: Path, settings: LaunchSettings) -> list[str]:
    """Lines of the batch script before srun."""
    ends = 'squeue --noheader --jobs "$job" --format %e'
    return [
        *surroundings(code, settings),
        "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
        "job=${job:-$SLURM_JOB_ID}",
        "# Signals may get lost on their way into a container: the ranks know the time limit themselves.",
        f"ends=$({ends})",
        f'export {DEADLINE}="$(date -d "${{ends:-unknown}}" +%s 2>/dev/null)"',
        "# A time limit or preemption signals this script, too; it outlives srun and decides what comes next.",
        "trap : TERM USR2",
        'echo "dist-train: attempt ${SLURM_RESTART_COUNT:-0} of job $job on $SLURM_JOB_NODELIST" >&2',
    ]


def script_of(executor: SlurmExecutor) -> str:
    """The batch script, as it will be submitted."""
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def test_only(script: Path) -> str:
    """Asks Slurm whether it would take the script, and when it would start; queues nothing. Nodes that are down count
    as absent in this question, though not for a job that is queued, so that this complaint is only passed on.

    Raises:
        UserError: it would not.
    """
    done = subprocess.run(
        ["sbatch", "--test-only", str(script)], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    said = " ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines())
    if not done.returncode:
        return said
    if "configuration is not available" in said:
        return f"Slurm could not start it now: {said}"
    raise refused(said)


def ours_win(settings: LaunchSettings) -> None:
    """Drops environment variables that would go before the batch script's own options: sbatch takes SBATCH_… for more
    important than #SBATCH. Those of options that are not set stay, as a site's or user's defaults.
    """
    always = ("SBATCH_NO_REQUEUE", "SBATCH_OPEN_MODE", "SBATCH_SIGNAL", "SBATCH_TIMELIMIT", "SBATCH_JOB_NAME")
    given = {
        "SBATCH_PARTITION": settings.partition,
        "SBATCH_ACCOUNT": settings.account,
        "SBATCH_QOS": settings.qos,
        "SBATCH_CONSTRAINT": settings.constraint,
        "SBATCH_RESERVATION": settings.reservation,
        "SBATCH_EXCLUSIVE": settings.exclusive or None,
        "SBATCH_GPUS_PER_NODE": settings.gpus_per_node,
        "SBATCH_MEM_PER_NODE": settings.memory,
    }
    for name in (*always, *(name for name, value in given.items() if value is not None)):
        os.environ.pop(name, None)


def submit(executor: submitit.Executor, job: Any) -> submitit.Job[Any]:
    """Queues a job.

    Raises:
        UserError: Slurm refuses it.
    """
    try:
        return executor.submit(job)
    except (FailedJobError, FailedSubmissionError) as error:
        raise refused(" ".join(str(error).split())) from None


def refused(said: str) -> UserError:
    """What sbatch complains about, with the remedy."""
    remedies = [remedy for word, remedy in REMEDIES.items() if word in said.lower()]
    return UserError(
        "sbatch", said or "refuses the job", remedies[0] if remedies else "See sbatch(1); --dry-run shows it."
    )
