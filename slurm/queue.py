"""The true state of jobs. squeue is asked first: a job that Slurm has requeued is FAILED or NODE_FAIL in the records of
the accounting and yet alive. The accounting tells of jobs that the controller has forgotten.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from slurm.ask import ask

# Base states and flags of squeue(1) in which a job is not over.
LIVE = {
    *("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"),
    *("REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"),
}
GONE = ("Invalid job id", "Invalid job array")  # the controller has forgotten it, or never knew it
JOB = re.compile(r"[0-9]{1,19}(_[0-9]{1,10})?")  # a record may come from anywhere: nothing else is put into commands
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
        answered: the controller did; else the job may be alive though UNKNOWN.
    """

    state: str
    reason: str = ""
    nodes: str = ""
    start: str = ""
    end: str = ""
    exit_code: int | None = None
    answered: bool = True

    @property
    def live(self) -> bool:
        """It runs, or will."""
        return self.state in LIVE


def job_state(job: str) -> JobState:
    """Asks the controller, then the accounting.

    Args:
        job: id, or ID_TASK of an array.
    """
    return job_states([job])[job]


def job_states(jobs: Iterable[str], seconds: float = SECONDS) -> dict[str, JobState]:
    """Of many jobs at once, which asks the controller once, and the accounting once if some have ended.

    Args:
        jobs: ids, or ID_TASK of arrays; what is none is UNKNOWN, and nobody is asked.
        seconds: each of the two may take.
    """
    every = dict.fromkeys(jobs)
    states = {job: JobState("UNKNOWN", "is no job id", answered=False) for job in every}
    asked = [job for job in every if JOB.fullmatch(job)]
    if not asked:
        return states
    command = ["squeue", "--noheader", "--array", "--jobs", ",".join(asked), "--states", "all"]
    found, text = ask([*command, "--format", "%i|%T|%r|%N|%S|%e"], seconds)
    told = f"squeue: {text.removeprefix('squeue: ')}"
    if not found and not any(word in text for word in GONE):
        return states | {job: JobState("UNKNOWN", told, answered=False) for job in asked}
    rows = [line.split("|") for line in text.splitlines()] if found else []
    # A job that other jobs wait for, or a plug-in that talks, may add lines; the last of a job counts.
    known = {}
    for row in rows:
        if len(row) == 6:
            number, state, reason, nodes, start, end = map(given, row)
            known[number] = JobState(state, reason, nodes, start, end)
    ended = [job for job in asked if job not in known or not (known[job].live or known[job].state == "COMPLETED")]
    nobody = dict.fromkeys(asked, JobState("UNKNOWN", "neither squeue nor sacct knows the job"))
    return states | nobody | {job: known[job] for job in asked if job in known} | from_accounting(ended, seconds)


def from_accounting(jobs: list[str], seconds: float) -> dict[str, JobState]:
    """Of jobs that have ended: what sacct knows."""
    if not jobs:
        return {}
    command = ["sacct", "--noheader", "--parsable2", "--allocations", "--jobs", ",".join(jobs)]
    found, text = ask([*command, "--format", "JobID,State,Reason,NodeList,Start,End,ExitCode"], seconds)
    rows = [line.split("|") for line in text.splitlines()] if found else []
    states = {}
    for row in rows:
        if len(row) == 7 and row[0] in jobs:
            state, reason, nodes, start, end, code = map(given, row[1:])
            number = re.match(r"(\d+):(\d+)", code)
            exit_code = None if number is None else int(number[1]) or (128 + int(number[2]) if int(number[2]) else 0)
            states[row[0]] = JobState(state.split(" ")[0], reason, nodes, start, end, exit_code)
    return states


def given(word: str) -> str:
    """A column, empty where Slurm writes that it has none."""
    word = word.strip()
    return "" if word in ("N/A", "(null)", "Unknown", "None assigned", "None", "NONE") else word


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
