"""The runs of a sweep on one machine: `python -m slurm.pool DIR` starts as many at once as it has room for."""

from __future__ import annotations

import os
import platform
import signal
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import submitit

from slurm.grid import Point
from slurm.local import submit_local, visible_gpus
from slurm.record import Submission
from slurm.settings import LaunchSettings
from slurm.sweep_record import SweepRecord

POLL = 0.2  # seconds


@dataclass
class Running:
    """A run that was started."""

    point: Point
    job: submitit.Job[int]
    ranks: int
    gpus: list[int]


class Pool:
    """Starts runs in order, each with GPUs of its own.

    Args:
        record: of the sweep.
        points: names of those to run.
        command: which asked for them.
    """

    def __init__(self, record: SweepRecord, points: list[str], command: str) -> None:
        self.record, self.command = record, command
        sweep = record.read()
        by_name = {point.name: point for point in sweep.points}
        self.waiting = deque(by_name[name] for name in points)
        self.gpus = visible_gpus() if sweep.settings.gpus_per_node else []
        self.cores = len(os.sched_getaffinity(0))
        self.room = sweep.parallel or len(self.gpus) or max(self.cores // sweep.settings.cpus_per_rank, 1)
        self.running: list[Running] = []
        self.stopped = False

    def run(self) -> None:
        """Until all have ended, or nothing more is to be started and what runs has ended."""
        os.environ.setdefault("OMP_NUM_THREADS", str(max(self.cores // self.room, 1)))
        signal.signal(signal.SIGTERM, self.stop)
        while self.running or (self.waiting and not self.stopped):
            for ended in [one for one in self.running if one.job.done()]:
                self.running.remove(ended)
                self.gpus = sorted([*self.gpus, *ended.gpus])
                say(f"{ended.point.name}: ended")
            while self.waiting and not self.stopped and self.start(self.waiting[0]):
                self.waiting.popleft()
            time.sleep(POLL)

    def stop(self, number: int, frame: FrameType | None) -> None:
        """SIGTERM: starts no more, and has what runs save and end."""
        self.stopped = True
        for one in self.running:
            os.kill(int(one.job.job_id), signal.SIGTERM)

    def start(self, point: Point) -> bool:
        """Starts a run if there is room. A run larger than all the room runs alone."""
        run = self.record.run(point)
        settings: LaunchSettings = run.read_launch().settings
        used = sum(one.ranks for one in self.running)
        wanted = settings.ranks if self.gpus or any(one.gpus for one in self.running) else 0
        if self.running and (used + settings.ranks > self.room or wanted > len(self.gpus)):
            return False
        gpus, self.gpus = self.gpus[:wanted], self.gpus[wanted:]
        job = submit_local(str(run.run), run.new_folder(), gpus)
        self.running.append(Running(point, job, settings.ranks, gpus))
        run.add_submission(
            Submission(
                cluster="local",
                job=job.job_id,
                submitted=time.time(),
                host=platform.node(),
                command=self.command,
                settings=settings,
            )
        )
        say(f"{point.name}: process {job.job_id}" + (f" on GPU {', '.join(map(str, gpus))}" if gpus else ""))
        return True


def say(text: str) -> None:
    """A line of the pool's log."""
    print(time.strftime("%Y-%m-%d %H:%M:%S"), text, flush=True)


def main(directory: Path) -> None:
    """The process."""
    record = SweepRecord(directory)
    deadline = time.monotonic() + 60
    while (pool := record.read_pool()) is None or pool.process != str(os.getpid()):  # is written by who started this
        if time.monotonic() > deadline:
            sys.exit("pool.json was never written")
        time.sleep(POLL)
    Pool(record, pool.points, pool.command).run()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
