"""Where the output of each rank lies: Submitit's files of a submitted job, or the launcher's of ranks it started."""

from __future__ import annotations

import re
from pathlib import Path

from slurm.queue import JOB
from slurm.record import Attempt, LaunchRecord


def job_folder(record: LaunchRecord, job: str) -> Path | None:
    """Submitit's folder of a job; the newest, if an id was given twice."""
    if not JOB.fullmatch(job):  # a record may come from anywhere
        return None
    folders = {path.parent for path in record.jobs.glob(f"*/{job}_*")}
    return max(folders, key=lambda path: (path.name.isdecimal(), len(path.name), path.name), default=None)


def job_logs(record: LaunchRecord, job: str, last: Attempt | None) -> dict[int, list[Path]]:
    """stderr and stdout files of a job that are there, by rank.

    Args:
        last: its last attempt: a local job's ranks but the first write to files of each attempt.
    """
    if not JOB.fullmatch(job):
        return {}
    folder = job_folder(record, job)
    found = {} if folder is None else by_rank(folder, rf"{job}_([0-9]{{1,9}})_log\.(?:err|out)")
    local = {} if last is None else by_rank(record.reports(last.job, last.restart), r"rank_([0-9]{1,9})\.log")
    return dict(sorted({**local, **found}.items()))


def run_logs(run: Path) -> dict[int, list[Path]]:
    """Files of the ranks that `dist-train train` started: all but rank 0, which writes to its terminal."""
    return by_rank(run / "logs", r"rank_([0-9]{1,9})\.log")


def stacks(run: Path) -> dict[int, list[Path]]:
    """Where the ranks wrote their stacks when the run stood still."""
    return by_rank(run / "logs", r"rank_([0-9]{1,9})\.stacks\.txt")


def reports(folder: Path) -> list[int]:
    """The ranks that reported an error (see `sharding.launch.report_errors`)."""
    return list(by_rank(folder, r"rank_([0-9]{1,9})\.error\.json"))


def by_rank(folder: Path, pattern: str) -> dict[int, list[Path]]:
    """The files of a folder whose name fits, by the rank in it."""
    found: dict[int, list[Path]] = {}
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return {}
    for path in entries:
        match = re.fullmatch(pattern, path.name)
        if match:
            found.setdefault(int(match[1]), []).append(path)
    return dict(sorted(found.items()))
