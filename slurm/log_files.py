"""Where the output of each rank lies: submitit's files of a submitted job, or the launcher's of a run by hand."""

from __future__ import annotations

import re
from pathlib import Path

from slurm.queue import JOB
from slurm.record import LaunchRecord


def job_folder(record: LaunchRecord, job: str) -> Path:
    """Submitit's folder of a job; of an array's elements it may be one for all."""
    own = Path(str(record.folder).replace("%j", job))
    shared = Path(str(record.folder).replace("%j", job.partition("_")[0]))
    return shared if shared.is_dir() and not own.is_dir() else own


def job_logs(record: LaunchRecord, job: str) -> dict[int, list[Path]]:
    """stderr and stdout files of a job that are there, by rank."""
    if not JOB.fullmatch(job):  # a record may come from anywhere
        return {}
    return by_rank(job_folder(record, job), rf"{job}_([0-9]{{1,9}})_log\.(?:err|out)")


def run_logs(run: Path) -> dict[int, list[Path]]:
    """Files of the ranks that `dist-train train` started: all but rank 0, which writes to its terminal."""
    return by_rank(run / "logs", r"rank_([0-9]{1,9})\.log")


def stacks(run: Path) -> dict[int, list[Path]]:
    """Where the ranks wrote their stacks when the run stood still."""
    return by_rank(run / "logs", r"rank_([0-9]{1,9})\.stacks\.txt")


def reports(folder: Path) -> dict[int, list[Path]]:
    """What the ranks reported (see `sharding.launch.report_errors`)."""
    return by_rank(folder, r"rank_([0-9]{1,9})\.error\.json")


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
