"""What is known of a run's submissions and attempts: files below DIR/slurm, written by `submit`, rank 0 and the batch
script, read by `status`, `logs`, `cancel` and the next attempt.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from sharding.errors import UserError
from sharding.files import read_bounded
from slurm.settings import LaunchSettings

OWN = "Put the run's own file back."
MOST_ROWS = 1 << 26  # bytes; an attempt on 1000 nodes writes 20 kB
Record = TypeVar("Record", bound=BaseModel)
Outcome = Literal["finished", "stopped", "failed", "hung", "bad nodes", "refused", "lost"]


class ChainLink(BaseModel):
    """A job that starts when the one before it has succeeded."""

    command: str
    job: str


class Followed(BaseModel):
    """A command of a chain that was begun."""

    job: str
    command: str
    began: float
    """Seconds since the epoch."""
    ended: float | None = None
    code: int | None = None

    @property
    def state(self) -> Literal["RUNNING", "COMPLETED", "FAILED"]:
        """In Slurm's words."""
        return "RUNNING" if self.ended is None else "FAILED" if self.code else "COMPLETED"


class Submission(BaseModel):
    """One `submit` of a run."""

    cluster: Literal["slurm", "local"]
    job: str
    """Job id, ID_TASK in an array; of submitit's local job: the process id of its controller."""
    submitted: float
    """Seconds since the epoch."""
    host: str
    command: str
    settings: LaunchSettings
    chain: list[ChainLink] = Field(default_factory=list)


class Launch(BaseModel):
    """What a job reads at its start; written before it is submitted, as it may start at once."""

    settings: LaunchSettings
    accept_other_base: bool = False
    chain: list[list[str]] = Field(default_factory=list)
    """Of a local job: words of the commands that follow (on Slurm they are jobs of their own)."""


class Failure(BaseModel):
    """What went wrong on one rank."""

    rank: int | None = None
    node: str | None = None
    error: str


class Attempt(BaseModel):
    """One start of a job: by submission, requeue or restart."""

    job: str
    restart: int
    """How often the job was started before."""
    started: float
    """Seconds since the epoch; as all times here."""
    nodes: list[str]
    ranks: int
    first_step: int
    """Optimizer steps made before it."""
    ended: float | None = None
    last_step: int | None = None
    outcome: Outcome | None = None
    """None while it runs. "stopped": it saved on request (time limit, preemption, signal). "lost": it never told, as
    when a node is lost."""
    failures: list[Failure] = Field(default_factory=list)
    """The first is the cause, as far as known."""
    decision: Literal["requeue", "stop", "done"] | None = None
    reason: str = ""
    """Why so, in a sentence."""
    excluded: list[str] = Field(default_factory=list)
    """Nodes the next attempt does without."""


class LaunchRecord:
    """The files below DIR/slurm.

    Args:
        run: the run directory.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.path = run / "slurm"
        self.submissions = self.path / "submissions.jsonl"
        self.attempts = self.path / "attempts.jsonl"
        self.chain = self.path / "chain.jsonl"  # commands that followed: begun, ended
        self.cancelled = self.path / "cancelled"  # exists: no requeue
        self.script = self.path / "job.sh"
        self.recipe = self.path / "recipe.yaml"  # as submitted, resolved
        self.code = self.path / "code"  # as submitted
        self.environment = self.path / "environment.json"
        self.launch = self.path / "launch.json"
        self.jobs = self.path / "jobs"  # of each submission a folder of Submitit's: logs of all ranks, pickles

    def new_folder(self) -> Path:
        """For a submission: fresh, as job ids may begin anew and old results would be taken for new ones."""
        number = 1 + max((int(path.name) for path in self.jobs.glob("[0-9]*") if path.name.isdecimal()), default=0)
        folder = self.jobs / str(number)
        folder.mkdir(parents=True)
        return folder

    def log(self, job: str, rank: int, stream: Literal["out", "err"]) -> Path | None:
        """What a rank of a job has printed; None if there is nothing. Rank 0's are also those of the batch script."""
        found = self.jobs.glob(f"[0-9]*/{job}_{rank}_log.{stream}")
        return max(found, key=lambda path: int(path.parent.name), default=None)

    def discard(self) -> None:
        """Removes all this."""
        shutil.rmtree(self.path, ignore_errors=True)

    def reports(self, job: str, restart: int) -> Path:
        """Folder in which the ranks of an attempt leave what went wrong."""
        return self.path / "attempts" / f"{job}.{restart}"

    def add_submission(self, submission: Submission) -> None:
        """Appends a submission."""
        append(self.submissions, submission.model_dump(mode="json"))

    def read_submissions(self) -> list[Submission]:
        """All submissions, oldest first.

        Raises:
            UserError: a line is none.
        """
        return [parse(Submission, row, self.submissions) for row in rows(self.submissions)]

    def write_launch(self, launch: Launch) -> None:
        """For the jobs to come."""
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.launch.with_suffix(".new")
        temporary.write_text(launch.model_dump_json(indent=1))
        temporary.replace(self.launch)

    def read_launch(self) -> Launch:
        """How the run is launched.

        Raises:
            UserError: it was never submitted, or the file is damaged.
        """
        try:
            return parse(Launch, json.loads(self.launch.read_text()), self.launch)
        except FileNotFoundError:
            raise UserError(str(self.run), "was never submitted", "Use dist-train submit.") from None
        except (OSError, ValueError) as error:
            raise UserError(
                str(self.launch), f"cannot be read ({error})", "Submit the run again with --resume."
            ) from None

    def add_followed(self, followed: Followed) -> None:
        """Appends a command that follows: once when it starts, again when it ends."""
        append(self.chain, followed.model_dump(mode="json"))

    def add_attempt(self, attempt: Attempt) -> None:
        """Appends an attempt: once when it starts, again when it ends."""
        append(self.attempts, attempt.model_dump(mode="json"))

    def read_attempts(self) -> list[Attempt]:
        """All attempts, oldest first; of each the last word.

        Raises:
            UserError: a line is none.
        """
        found: dict[tuple[str, int], Attempt] = {}
        for row in rows(self.attempts):
            attempt = parse(Attempt, row, self.attempts)
            found[attempt.job, attempt.restart] = attempt
        return list(found.values())


def append(path: Path, row: dict[str, Any]) -> None:
    """One line more, in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def rows(path: Path) -> Iterator[Any]:
    """The lines of a file as JSON; a line cut by a power failure is left out.

    Raises:
        UserError: it cannot be read, is no regular file, or larger than any of ours.
    """
    try:
        text = read_bounded(path, MOST_ROWS, OWN).decode(errors="replace")
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(str(path), f"cannot be read ({error.strerror})", OWN) from None
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):
            continue


def parse(kind: type[Record], row: Any, path: Path) -> Record:
    """A line as what it stands for."""
    try:
        return kind.model_validate(row)
    except ValidationError as error:
        found = error.errors()[0]
        place = ".".join(map(str, found["loc"]))
        raise UserError(
            str(path), f"holds a line that is none of ours ({place}: {found['msg']})", "Remove it."
        ) from None
