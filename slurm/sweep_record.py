"""What is known of a sweep: files below DIR/.sweep. The runs, one directory each, lie in DIR itself."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from sharding.errors import UserError
from slurm.grid import Point
from slurm.progress import process_lives
from slurm.record import LaunchRecord, parse
from slurm.settings import LaunchSettings


class Sweep(BaseModel):
    """A sweep, as submitted last."""

    grid: str
    """Path of the grid file."""
    cluster: Literal["slurm", "local"]
    settings: LaunchSettings
    points: list[Point]
    parallel: int | None = None


class PoolProcess(BaseModel):
    """The process that starts the runs of a sweep on one machine."""

    host: str
    process: str
    started: float
    """Seconds since the epoch."""
    points: list[str]
    """Names of those that it is to run, in order."""
    command: str
    """Which made it."""

    @property
    def lives(self) -> bool:
        """Whether it runs, as far as this machine can tell."""
        return self.host == platform.node() and process_lives(self.process, self.started + 1)


class SweepRecord:
    """The files below DIR/.sweep.

    Args:
        directory: DIR.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self.path = self.directory / ".sweep"  # not seen by DIR/*/, which thus names the runs
        self.sweep = self.path / "sweep.json"
        self.pool = self.path / "pool.json"
        self.pool_log = self.path / "pool.log"

    def run(self, point: Point) -> LaunchRecord:
        """The record of a point's run."""
        return LaunchRecord(self.directory / point.name)

    def new_folder(self) -> Path:
        """For a submission: the grid file, the code and the environment of that time, and its arrays. Code that queued
        jobs are to run is never replaced.
        """
        numbers = [int(path.name) for path in self.path.glob("[0-9]*") if path.name.isdecimal()]
        folder = self.path / str(1 + max(numbers, default=0))
        folder.mkdir(parents=True)
        return folder

    def write(self, sweep: Sweep) -> None:
        """Writes it, whole or not at all."""
        self.path.mkdir(parents=True, exist_ok=True)
        replace(self.sweep, sweep.model_dump_json(indent=1))

    def read(self) -> Sweep:
        """The sweep.

        Raises:
            UserError: there is none, or its file is damaged.
        """
        remedy = "Give the --output of `dist-train sweep`."
        try:
            return parse(Sweep, json.loads(self.sweep.read_text()), self.sweep)
        except FileNotFoundError:
            raise UserError(str(self.directory), "holds no sweep", remedy) from None
        except (OSError, ValueError) as error:
            raise UserError(str(self.sweep), f"cannot be read ({error})", remedy) from None

    def read_pool(self) -> PoolProcess | None:
        """The process that starts the runs on one machine; None if there never was one."""
        try:
            return parse(PoolProcess, json.loads(self.pool.read_text()), self.pool)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(str(self.pool), f"cannot be read ({error})", "Remove it.") from None

    def write_pool(self, pool: PoolProcess) -> None:
        """Writes it, whole or not at all."""
        replace(self.pool, pool.model_dump_json(indent=1))


def replace(path: Path, text: str) -> None:
    """Writes a file, whole or not at all."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text)
    temporary.replace(path)
