"""The run directory: what a run leaves behind, by name (DESIGN §3)."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

from sharding.errors import UserError

PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "webdataset",
    "safetensors",
    "numpy",
    "bitsandbytes",
    "flash-attn",
)

REVISION = "REVISION"  # beside the packages, in a copy of the code that a submission keeps


class RunDirectory:
    """Paths inside a run directory, and what is written there.

    Args:
        path: the directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.environment = path / "environment.json"
        self.parameters = path / "parameters.json"
        self.plan = path / "plan.json"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.checkpoints = path / "checkpoints"
        self.tokenizer = path / "tokenizer"
        self.logs = path / "logs"
        self._made: list[Path] = []  # by create, innermost first

    def create(self) -> None:
        """Makes a new run directory. That what was written before a run began (slurm/) is there does not matter.

        Raises:
            UserError: it exists, or cannot be made.
        """
        if self.path.exists() and (not self.path.is_dir() or any(one.name != "slurm" for one in self.path.iterdir())):
            raise UserError(
                str(self.path), "exists already", "Give another --output, or continue that run with --resume."
            )
        self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.logs.mkdir(parents=True)
        except OSError as error:
            raise UserError(
                str(self.path), f"cannot be made ({error.strerror})", "Give an --output you may write to."
            ) from None

    @property
    def saved(self) -> bool:
        """Whether a checkpoint was ever saved (it may be damaged)."""
        from sharding.retention import completed  # noqa: PLC0415  needs torch, and the launcher does without

        return bool(completed(self.checkpoints))

    def discard_unstarted(self) -> None:
        """Removes the directory again, and parents made for it, if no run began in it."""
        if not self.recipe.is_file():
            shutil.rmtree(self.logs, ignore_errors=True)
            shutil.rmtree(self.tokenizer, ignore_errors=True)
            with contextlib.suppress(OSError):
                for folder in self._made:
                    folder.rmdir()

    def open(self) -> None:
        """Checks that the directory holds a run.

        Raises:
            UserError: it does not.
        """
        if not self.recipe.is_file():
            raise UserError(
                str(self.path), "is not a run directory (no recipe.yaml)", "Give the --output of `dist-train train`."
            )
        refuse_links(self.path)

    def log(self, row: dict[str, Any]) -> None:
        """Appends one line to metrics.jsonl.

        Raises:
            UserError: the disk refuses it.
        """
        try:
            with self.metrics.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(
                str(self.metrics),
                f"cannot be written ({error.strerror})",
                "Free space or permissions, then run again with --resume.",
            ) from None

    def rewind(self, step: int) -> None:
        """Drops metrics of steps after `step`: a resumed run writes them again. Drops a line cut by a full disk too."""
        if self.metrics.is_file():
            rows = [row for row in self.metrics.read_text().splitlines() if step_of(row) <= step]
            temporary = self.metrics.with_suffix(".new")
            temporary.write_text("".join(row + "\n" for row in rows))
            temporary.replace(self.metrics)

    def restart(self) -> None:
        """Drops what a try that saved nothing has logged and measured."""
        self.rewind(0)
        self.plan.unlink(missing_ok=True)

    def write_environment(self, world_size: int) -> None:
        """environment.json: versions, code, hardware, command, and the id that the run keeps when it is resumed."""
        record = {"run_id": uuid.uuid4().hex, **environment(world_size)}
        self.environment.write_text(json.dumps(record, indent=1))

    @property
    def id(self) -> str:
        """The run's id, as in environment.json.

        Raises:
            UserError: the file is missing or holds none.
        """
        try:
            return str(json.loads(self.environment.read_bytes())["run_id"])
        except (OSError, ValueError, KeyError, TypeError):
            problem = "holds no run_id"
            raise UserError(str(self.environment), problem, "Put the run's own file back, or start anew.") from None


def refuse_links(path: Path) -> None:
    """Refuses a run directory through which something outside would be written over. That all checkpoints lie on
    another disk, by a link, is usual.

    Raises:
        UserError: names the link.
    """
    inside, stored = path.resolve(), path / "checkpoints"
    for entry in sorted((*path.glob("*"), *path.glob("*/*"))):
        try:
            places = (inside, stored.resolve())
            leads_out = entry.is_symlink() and not any(map(entry.resolve().is_relative_to, places))
            leads_out = leads_out and not (entry == stored and entry.is_dir())
        except RuntimeError:  # links in a circle
            leads_out = True
        if leads_out:
            raise UserError(
                str(entry),
                "is a link that leads out of the run directory",
                "Put there what it names, or link the whole run directory.",
            )


def step_of(row: str) -> float:
    """Step of a line of metrics.jsonl; infinite for a line that is not whole, or no record."""
    try:
        return float(json.loads(row)["step"])
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
        return math.inf


def environment(world_size: int) -> dict[str, Any]:
    """What this run was made with."""
    import torch  # noqa: PLC0415  the launcher makes run directories without it

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": shlex.join(sys.argv),
        "world_size": world_size,
        "python": platform.python_version(),
        "packages": versions,
        "git": git_revision(),
        "host": platform.node(),
        "system": platform.platform(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }


def git_revision() -> str | None:
    """Commit of this code, with "+changes" if the working tree differs; None outside a git checkout. A copy of the code
    has it in a file.
    """
    source = Path(__file__).parent
    with contextlib.suppress(OSError):
        return (source.parent / REVISION).read_text().strip() or None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(source), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
