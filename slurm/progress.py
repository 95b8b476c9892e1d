"""How far a run is, from the files in its directory; nothing that imports torch."""

from __future__ import annotations

import json
import platform
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from dist_train.run_directory import RunDirectory
from sharding.errors import UserError
from sharding.files import MOST_YAML, read_bounded, read_tail
from sharding.plain_yaml import check_yaml

MOST_HEARTBEAT = 1 << 24  # bytes; 10,000 ranks write 2 MB
MOST_METRICS = 1 << 21  # bytes looked at, from the end: about 2000 steps
PACE_STEPS = 50  # over which the pace is taken
CLOCK = 2.0  # seconds by which the time when a process began may be wrong
SILENT = 60.0  # seconds without a heartbeat, which comes every 5 s at the latest
LEFT_OUT = "It is left out."
SAVED = re.compile(r"step_([0-9]{8,18})")
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Place(BaseModel):
    """Where a rank is: a row of heartbeat.json (see `sharding.watchdog.Place`)."""

    phase: str
    step: int
    idle: float
    module: str | None = None
    process: str

    @property
    def host(self) -> str:
        """Its machine."""
        return self.process.rpartition(":")[0]

    def lives(self, told: float) -> bool | None:
        """Whether its process still runs; None if it is on another machine.

        Args:
            told: when it was last heard of: a process that began later is another one.
        """
        if self.host != platform.node():
            return None
        return process_lives(self.process.rpartition(":")[2], told)


class Progress(BaseModel):
    """What the files tell. None: not known yet."""

    step: int | None = None
    total_steps: int | None = None
    epoch: int | None = None
    """From 1."""
    epochs: int | None = None
    loss: float | None = None
    clips_per_second: float | None = None
    step_seconds: float | None = None
    seconds_left: float | None = None
    """To the end of training at the pace of the last steps, validations included once there was one."""
    logged: float | None = None
    """When the last step was logged: seconds since the epoch, as all times here."""
    phase: str | None = None
    """Of the rank that is furthest behind."""
    places: list[Place] = Field(default_factory=list)
    heard: float | None = None
    """When the ranks were last heard of."""
    watched: bool = True
    """The recipe wants heartbeats."""
    saved_step: int | None = None
    saved: float | None = None
    begun: float | None = None
    """When it was started, or resumed: recipe.yaml was written."""
    finished: float | None = None
    """When summary.json was written."""

    def fresh(self, now: float) -> bool:
        """The ranks were heard of just now."""
        return self.heard is not None and now - self.heard < SILENT


def process_lives(pid: str, told: float) -> bool:
    """Whether a process of this machine runs that began before `told`."""
    if not re.fullmatch(r"[0-9]{1,10}", pid):
        return False
    try:
        process = psutil.Process(int(pid))
        return process.create_time() <= told + CLOCK and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, ValueError, OverflowError):
        return False


def read_progress(directory: Path, notes: list[str]) -> Progress:
    """What a run directory tells of its run. What is damaged is left out and named in `notes`."""
    run, found = RunDirectory(directory), Progress()
    found.finished, found.begun = modified(run.summary), modified(run.recipe) or modified(run.logs)
    read_recipe(run.recipe, found, notes)
    read_metrics(run.metrics, found, notes)
    read_heartbeat(run.logs / "heartbeat.json", found, notes)
    if found.places and found.finished is None:
        behind = min(found.places, key=lambda place: place.step)
        found.phase = behind.phase
        found.step = behind.step if found.step is None else found.step
    last = run.checkpoints / "last"
    with suppress(OSError):  # none was saved yet
        match = SAVED.fullmatch(last.readlink().name)
        if match:
            found.saved_step, found.saved = int(match[1]), modified(last / "manifest.json")
    return found


def read_recipe(path: Path, found: Progress, notes: list[str]) -> None:
    """How many epochs there are to be, and whether heartbeats are wanted."""
    text = read(path, MOST_YAML, notes)
    try:
        check_yaml(text or "")
        values = yaml.load(text or "", Loader=Loader)
        training = values.get("training") if isinstance(values, dict) else None
    except (yaml.YAMLError, ValueError, RecursionError):
        notes.append(f"{path}: is no recipe. {LEFT_OUT}")
        return
    if isinstance(training, dict):
        found.epochs = whole(training.get("epochs"))
        found.watched = training.get("watchdog_seconds", 600) is not None


def read_metrics(path: Path, found: Progress, notes: list[str]) -> None:
    """The last step, and the pace of the last ones."""
    found.logged = modified(path)
    steps: list[dict[str, Any]] = []
    validations: list[dict[str, Any]] = []
    for line in (read(path, MOST_METRICS, notes, tail=True) or "").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # cut by a power failure, or being written
            continue
        if isinstance(row, dict) and whole(row.get("step")) is not None:
            (steps if row.get("kind") == "step" else validations).append(row)
    if not steps:
        return
    last = steps[-1]
    found.step, found.loss = whole(last["step"]), finite(last.get("loss"))
    found.total_steps = whole(last.get("total_steps"))
    epoch = whole(last.get("epoch"))
    found.epoch = None if epoch is None else epoch + 1
    timed = [
        row for row in steps[-PACE_STEPS:] if not row.get("measured") and (finite(row.get("step_seconds")) or 0) > 0
    ]
    if not timed:
        return
    seconds = sum(row["step_seconds"] for row in timed)
    found.step_seconds = seconds / len(timed)
    found.clips_per_second = sum(finite(row.get("clips")) or 0 for row in timed) / seconds
    if found.total_steps is not None and found.step is not None:
        validating = sum(finite(row.get("seconds")) or 0 for row in validations) / len(steps)
        found.seconds_left = max(found.total_steps - found.step, 0) * (found.step_seconds + validating)


def read_heartbeat(path: Path, found: Progress, notes: list[str]) -> None:
    """Where the ranks are, or were when they were last heard of."""
    text = read(path, MOST_HEARTBEAT, notes)
    if text is None:
        return
    try:
        found.places = TypeAdapter(list[Place]).validate_json(text)
    except ValidationError:
        notes.append(f"{path}: is damaged. {LEFT_OUT}")
        return
    found.heard = modified(path)


def read(path: Path, most: int, notes: list[str], *, tail: bool = False) -> str | None:
    """The text of a file, None if there is none."""
    try:
        return (read_tail if tail else read_bounded)(path, most, LEFT_OUT).decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        notes.append(f"{path}: cannot be read ({error.strerror}). {LEFT_OUT}")
    except UserError as error:
        notes.append(str(error))
    return None


def modified(path: Path) -> float | None:
    """When a file was written."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def finite(value: Any) -> float | None:
    """A number out of a foreign file; None for what is none."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and abs(value) < 1e30 else None  # NaN compares false


def whole(value: Any) -> int | None:
    """A count out of a foreign file; None for what is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63 else None


def ago(when: float, now: float | None = None) -> str:
    """How long ago, in words."""
    passed = (time.time() if now is None else now) - when
    return f"{lasting(passed)} ago" if passed >= 1 else "just now"


def lasting(seconds: float) -> str:
    """A length of time, in words, to two units."""
    if not 0 <= seconds < 1e12:  # foreign files may hold any number
        return "a while"
    seconds = int(seconds)
    for big, small, size, part in (("d", "h", 86400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if seconds >= size:
            count, rest = seconds // size, seconds % size // part
            return f"{count} {big} {rest} {small}" if rest and count < 20 else f"{count} {big}"
    return f"{seconds} s"
