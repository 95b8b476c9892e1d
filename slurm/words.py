"""What Slurm's names of reasons and ends mean, in plain words."""

from __future__ import annotations

import re

# Why a job waits: squeue(1), JOB REASON CODES. The first pattern that fits counts.
REASONS = (
    (r"Priority", "other jobs are before it in the queue"),
    (r"Resources", "it is next, and waits for nodes to become free"),
    (r"BeginTime", "its begin time has not come; a requeued job waits about two minutes"),
    (r"Dependency", "it waits for another job"),
    (r"DependencyNeverSatisfied", "the job it waits for has failed: it will never start; cancel it"),
    (r"JobHeldUser", "it is held: release it with scontrol release"),
    (r"JobHeldAdmin", "an administrator holds it"),
    (r"JobArrayTaskLimit", "as many elements of its array run as may at once"),
    (r"(launch failed|job) requeued.*held", "Slurm could not start it, and holds it: release it with scontrol release"),
    (r"PartitionDown|PartitionInactive", "its partition is closed"),
    (r"PartitionNodeLimit", "it asks for more nodes than its partition gives one job: it will never start as it is"),
    (r"PartitionTimeLimit", "it asks for more time than its partition gives: it will never start as it is"),
    (r"ReqNodeNotAvail.*?(UnavailableNodes:(?P<names>\S+))?", "nodes it needs are down, drained or reserved{names}"),
    (r"Nodes required for job are DOWN.*", "nodes it needs are down, drained or reserved for others"),
    (r"NodeDown", "a node it needs is down"),
    (r"BadConstraints", "no node has what it asks for: it will never start as it is"),
    (r"Reservation.*", "its reservation has not begun"),
    (r"Licenses", "it waits for a licence"),
    (r"Cleaning", "its last start is still being cleaned up"),
    (r"Prolog", "its nodes are being prepared"),
    (r"(QOS|Assoc|Association|User|Account).*Time.*", "the time it asks for is above a limit of its account or QOS"),
    (r"QOS.*PerUser.*|QOS.*PU", "you have as much as your quality of service (QOS) lets one user have at once"),
    (r"QOS.*", "a limit of its quality of service (QOS) is reached"),
    (r"Assoc.*|User.*|Account.*|Invalid(Account|QOS)", "a limit of its account is reached"),
)
# How a job has ended: squeue(1), JOB STATE CODES.
ENDS = {
    "COMPLETED": "it came to its end",
    "FAILED": "it failed",
    "CANCELLED": "it was cancelled",
    "TIMEOUT": "its time limit was over before it had saved",
    "NODE_FAIL": "a node was lost",
    "PREEMPTED": "another job took its nodes",
    "OUT_OF_MEMORY": "it ran out of main memory",
    "BOOT_FAIL": "a node did not boot",
    "DEADLINE": "its deadline was over",
    "REVOKED": "another cluster of the federation took it",
    "ENDED": "its process has ended",  # ours, of a job on this machine
}


def why_waiting(reason: str) -> str:
    """Why a job waits, with Slurm's name for it; "" if Slurm gives no reason."""
    for pattern, words in REASONS:
        match = re.fullmatch(pattern, reason)
        if match:
            names = match.groupdict().get("names")
            return f"{words.format(names=f' ({names})' if names else '')} [Slurm: {match[0].split(',')[0]}]"
    return f"Slurm's reason: {reason}" if reason else ""


def how_ended(state: str, reason: str, exit_code: int | None) -> str:
    """How a job has ended."""
    words = ENDS.get(
        state, f"Slurm's state: {state}" if state not in ("", "UNKNOWN") else "Slurm has forgotten the job"
    )
    code = f", exit code {exit_code}" if exit_code and state == "FAILED" else ""
    return words + code + (f" [{reason}]" if reason and reason not in ENDS else "")
