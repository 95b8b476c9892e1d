"""The end of the batch script: how did the attempt end, what next? `python -m slurm.aftermath DIR CODE` runs on the
job's first node, when no rank is left that could still save, and requeues the job last of all.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from sharding.errors import UserError
from sharding.files import read_tail
from sharding.launch import HUNG, reported_errors
from slurm.ask import ask
from slurm.job import OUTCOME, identity, saved_step
from slurm.queue import expand, job_state
from slurm.record import OWN, Attempt, Failure, LaunchRecord
from slurm.restart import Decision, decide
from slurm.settings import LaunchSettings

PATIENCE = 600.0  # seconds in which a controller that restarts must be back
MARK = "dist-train: attempt"  # begins the line which the batch script writes to its stderr at the start of each attempt
# Of srun: "srun: error: node2: task 3: Killed", "srun: error: node1: tasks 0-1: Exited with exit code 3".
TOLD = re.compile(r"^srun: error: (?P<node>[\w.-]+): tasks? (?P<task>\d+)[\d,-]*: (?P<how>.+)$", re.MULTILINE)
PEER = re.compile(r"connection (was )?(closed|reset)|broken pipe|socket closed|remote process", re.IGNORECASE)
ENDED_BY_SLURM = "Slurm has ended or requeued it"


def main(run: Path, code: int) -> int:
    """Records the end of this attempt, and requeues the job if it should go on. Returns the script's exit code."""
    for number in (signal.SIGTERM, signal.SIGUSR2):  # the requeue ends this job's processes, scontrol among them
        signal.signal(number, signal.SIG_IGN)
    record = LaunchRecord(run)
    job, restart = identity(os.environ)
    settings = record.read_launch().settings
    attempts = [attempt for attempt in settle(record.read_attempts(), job, restart) if attempt.job == job]
    attempt = conclude(record, attempts, job, restart, code)
    state = job_state(job)
    if attempt.outcome not in ("finished", "refused") and state.state not in ("RUNNING", "UNKNOWN"):
        attempt = attempt.model_copy(update={"reason": f"{ENDED_BY_SLURM} ({state.state})"})
        record.add_attempt(attempt)
        return code or 1
    attempts = [*attempts[:-1], attempt]
    decision = decide(attempts, settings, cancelled=record.cancelled.exists())
    if decision.action == "requeue" and (shortage := too_few(decision.excluded, settings)):
        decision = Decision("stop", shortage, decision.excluded)
    update = {"decision": decision.action, "reason": decision.reason, "excluded": decision.excluded}
    record.add_attempt(attempt.model_copy(update=update))
    print(f"dist-train: {decision.action}: {decision.reason}", file=sys.stderr, flush=True)
    if decision.action == "requeue":
        return requeue(record, attempt.model_copy(update=update), settings)
    return 0 if decision.action == "done" else code or 1


def settle(attempts: Sequence[Attempt], job: str, restart: int) -> list[Attempt]:
    """Attempts before this one that never told their end are lost: Slurm itself has requeued the job."""
    return [
        attempt.model_copy(update={"outcome": attempt.outcome or "lost"})
        if (attempt.job, attempt.restart) != (job, restart)
        else attempt
        for attempt in attempts
    ]


def conclude(record: LaunchRecord, attempts: list[Attempt], job: str, restart: int, code: int) -> Attempt:
    """This attempt with its outcome."""
    if not attempts or attempts[-1].restart != restart:  # it ended before rank 0 could write
        nodes = expand(os.environ.get("SLURM_JOB_NODELIST", ""))
        step = saved_step(record.run)
        attempts.append(Attempt(job=job, restart=restart, started=time.time(), nodes=nodes, ranks=0, first_step=step))
    return outcome_of(record, attempts[-1], code, batch_errors(record, job))


def outcome_of(record: LaunchRecord, attempt: Attempt, code: int, errors: str) -> Attempt:
    """The attempt with how it ended.

    Args:
        code: of srun, or of the local rank that failed first.
        errors: what srun has written.
    """
    reports = record.reports(attempt.job, attempt.restart)
    failures = find_failures(reports, errors)
    outcome = "failed"
    try:
        told = json.loads((reports / OUTCOME).read_bytes())
        outcome = told["outcome"]
        failures = [Failure(node=node, error=why) for node, why in told["nodes"].items()]
    except OSError:
        if code == HUNG:
            outcome = "hung"
        elif code == 2 and failures:
            outcome = "refused"
    if outcome == "failed" and not failures:
        failures = [Failure(error=f"the ranks ended with exit code {code}")]
    done = saved_step(record.run) if outcome == "stopped" else logged_step(record.run)
    return attempt.model_copy(
        update={"ended": time.time(), "outcome": outcome, "failures": failures, "last_step": done}
    )


def find_failures(reports: Path, errors: str) -> list[Failure]:
    """What went wrong, the likely cause first: a rank that was killed, then what ranks reported, then those that only
    missed another one.
    """
    found = [
        Failure(rank=int(match["task"]), node=match["node"], error=match["how"].strip())
        for match in TOLD.finditer(errors)
    ]
    hosts = {failure.rank: failure.node for failure in found}
    first = found[:1] if found and not found[0].error.startswith(("Exited", "Terminated")) else []
    reported = []
    for error in reported_errors(reports):
        match = re.match(r"rank (\d+)(?: on (\S+))?", error.where)
        rank = int(match[1]) if match else None
        node = (match[2] if match else None) or hosts.get(rank)
        reported.append(Failure(rank=rank, node=node, error=str(error)))
    reported.sort(key=lambda failure: PEER.search(failure.error) is not None)
    return [*first, *reported] or found


def batch_errors(record: LaunchRecord, job: str) -> str:
    """What the batch script and srun have written to stderr in this attempt."""
    path = record.log(job, 0, "err")
    if path is None:
        return ""
    try:
        return read_tail(path, 1 << 20, OWN).decode(errors="replace").rpartition(MARK)[2]
    except (OSError, UserError):
        return ""


def logged_step(run: Path) -> int:
    """The last step in metrics.jsonl; how far the run came, saved or not."""
    try:
        lines = read_tail(run / "metrics.jsonl", 1 << 16, OWN).decode(errors="replace").splitlines()
    except (OSError, UserError):
        return 0
    for line in reversed(lines):
        try:
            row = json.loads(line)
            if row["kind"] == "step":
                return int(row["step"])
        except (ValueError, LookupError, TypeError):
            continue
    return saved_step(run)


def too_few(excluded: list[str], settings: LaunchSettings) -> str | None:
    """Why the job could never start again without these nodes; None if it can."""
    if not excluded:
        return None
    partition = os.environ.get("SLURM_JOB_PARTITION", settings.partition or "")
    known, text = ask(["sinfo", "--noheader", "--Node", "--partition", partition, "--format", "%N"], 20)
    left = set(text.split()) - set(excluded) - set(expand(settings.exclude or ""))
    if not known or len(left) >= settings.node_counts[0]:
        return None
    return (
        f"without {', '.join(excluded)} the partition {partition} has {len(left)} nodes, the run needs "
        f"{settings.node_counts[0]}"
    )


def requeue(record: LaunchRecord, attempt: Attempt, settings: LaunchSettings) -> int:
    """Puts the job back into the queue, to start on other nodes than the excluded ones."""
    job, _ = identity(os.environ)  # not SLURM_JOB_ID: an array's last element has that of the whole array
    deadline, error = time.monotonic() + PATIENCE, ""
    while time.monotonic() < deadline:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        error = done.stderr.strip()
        if done.returncode == 0 or "already" in error:
            exclude(job, attempt.excluded, settings)
            time.sleep(60)  # the requeue ends this script
            return 0
        if not re.search(r"contact|timed out|unable to connect|communicat|socket", error, re.IGNORECASE):
            break
        time.sleep(5)
    why = f"cannot be requeued ({error}); submit again with --resume"
    print(f"dist-train: {why}", file=sys.stderr, flush=True)
    record.add_attempt(attempt.model_copy(update={"decision": "stop", "reason": why}))
    return 1


def exclude(job: str, nodes: list[str], settings: LaunchSettings) -> None:
    """Slurm takes this for waiting jobs only: between the requeue and the next start."""
    if nodes:
        every = ",".join([*([settings.exclude] if settings.exclude else []), *nodes])
        done = subprocess.run(
            ["scontrol", "update", f"JobId={job}", f"ExcNodeList={every}"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(f"dist-train: {every} could not be excluded: {done.stderr.strip()}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
