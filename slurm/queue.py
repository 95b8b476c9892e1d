"""The true state of jobs. squeue is asked first: a job that Slurm has requeued is FAILED or NODE_FAIL in the records of
the accounting and yet alive. The accounting tells of jobs that the controller has forgotten.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from slurm.ask import ask

# Base states and flags of squeue(1) in which a job is not over.
LIVE = {
    *("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"),
    *("REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"),
}
GONE = ("Invalid job id", "Invalid job array")  # the controller has forgotten it, or never knew it
SECONDS = 20.0  # a busy controller may take


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job.

    Attributes:
        state: as Slurm names it, e.g. PENDING, RUNNING, FAILED; UNKNOWN where nobody knows.
        reason: why it waits or ended, as Slurm names it; what refused to answer, if the state is UNKNOWN.
        nodes: its node list, as Slurm writes it.
        start: begin or expected begin, as Slurm prints it; "" if unknown.
        end: end, or when its time limit is over.
        exit_code: of the batch script; known of ended jobs with accounting.
    """

    state: str
    reason: str = ""
    nodes: str = ""
    start: str = ""
    end: str = ""
    exit_code: int | None = None

    @property
    def live(self) -> bool:
        """It runs, or will."""
        return self.state in LIVE


def job_state(job: str) -> JobState:
    """Asks the controller, then the accounting.

    Args:
        job: id, or ID_TASK of an array.
    """
    found, text = ask(["squeue", "--noheader", "--jobs", job, "--states", "all", "--format", "%T|%r|%N|%S|%e"], SECONDS)
    lines = [line.split("|") for line in text.splitlines()] if found else []
    if lines and len(lines[-1]) == 5:
        state, reason, nodes, start, end = (given(word) for word in lines[-1])
        if state in LIVE or state == "COMPLETED":
            return JobState(state, "" if reason == "None" else reason, nodes, start, end)
        known = JobState(state, "" if reason == "None" else reason, nodes, start, end)
    elif not found and not any(word in text for word in GONE):
        return JobState("UNKNOWN", f"squeue: {text}")
    else:
        known = None
    return from_accounting(job) or known or JobState("UNKNOWN", "neither squeue nor sacct knows the job")


def from_accounting(job: str) -> JobState | None:
    """What sacct knows of a job; None if nothing."""
    fields = "State,Reason,NodeList,Start,End,ExitCode"
    found, text = ask(
        ["sacct", "--noheader", "--parsable2", "--allocations", "--jobs", job, "--format", fields], SECONDS
    )
    lines = [line.split("|") for line in text.splitlines()] if found else []
    if not lines or len(lines[-1]) != 6:
        return None
    state, reason, nodes, start, end, code = (given(word) for word in lines[-1])
    number = re.match(r"(\d+):(\d+)", code)
    exit_code = None if number is None else int(number[1]) or (128 + int(number[2]) if int(number[2]) else 0)
    return JobState(state.split(" ")[0], "" if reason == "None" else reason, nodes, start, end, exit_code)


def given(word: str) -> str:
    """A column, empty where Slurm writes that it has none."""
    word = word.strip()
    return "" if word in ("N/A", "(null)", "Unknown", "None assigned", "NONE") else word


def expand(nodes: str) -> list[str]:
    """The hosts of a node list such as gpu[03-05,12],login1."""
    hosts = []
    for prefix, ranges, suffix in re.findall(r"([^,\[\]]+)(?:\[([^\]]*)\])?([^,\[]*)", nodes):
        for part in ranges.split(",") if ranges else [""]:
            first, _, last = part.partition("-")
            if not last:
                hosts.append(prefix + part + suffix)
                continue
            hosts += [f"{prefix}{number:0{len(first)}d}{suffix}" for number in range(int(first), int(last) + 1)]
    return hosts
