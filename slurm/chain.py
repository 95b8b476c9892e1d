"""Commands that follow a run: `submit --then`. Each is a job of its own, which starts when the one before succeeded."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
from submitit.slurm.slurm import SlurmExecutor

from dist_train import cli
from sharding.errors import UserError
from slurm.executor import plain_executor, script_of, submit, surroundings, test_only
from slurm.job import identity, leave
from slurm.record import ChainLink, Followed, LaunchRecord
from slurm.settings import LaunchSettings

USAGE_ERROR: Any = typer.BadParameter.__base__  # of whichever click typer has
RUN = "{run}"
RUN_ARGUMENT = ("DIR", "DIR...")  # how `--help` calls a run directory
ON_GPU = ("evaluate", "train")  # commands that take a GPU if the run has some


@dataclass(frozen=True)
class Link:
    """A command that follows.

    Args:
        words: of the command line, after dist-train.
        params: what they mean, by the names of the command's parameters.
    """

    words: tuple[str, ...]
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """As it is typed."""
        return shlex.join(["dist-train", *self.words])


@dataclass(frozen=True)
class ChainJob:
    """Carries out a command on this node. Pickled by the name of its class, as `TrainingJob` is.

    Args:
        run: the run directory, absolute.
        words: as in `Link`.
    """

    run: str
    words: tuple[str, ...]

    def __call__(self) -> int:
        """Returns 0. Ends the process with the command's exit code if that is another."""
        job, _ = identity(os.environ)
        code = self.carry_out(job)
        if code:
            leave(code)
        return code

    def carry_out(self, job: str) -> int:
        """Carries it out, and writes that down under that job. Returns the exit code, 1 if it was killed."""
        record = LaunchRecord(Path(self.run))
        followed = Followed(job=job, command=Link(self.words).command, began=time.time())
        record.add_followed(followed)
        process = subprocess.Popen([sys.executable, "-m", "dist_train.cli", *self.words])
        before = signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
        try:
            code = process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
        code = code if code >= 0 else 1
        record.add_followed(followed.model_copy(update={"ended": time.time(), "code": code}))
        return code


def read_chain(texts: Sequence[str], run: Path, errors: list[UserError]) -> list[Link]:
    """The commands of `--then`, checked as far as they can be before the run is there.

    Args:
        texts: as given, e.g. "convert --to huggingface"; {run} stands for the run directory.
        run: absolute.
        errors: what is wrong is added; such commands are left out.
    """
    links = []
    for text in texts:
        try:
            links.append(read_link(text, run))
        except UserError as error:
            errors.append(UserError(f"--then {text!r}", error.problem, error.remedy))
    return links


def read_link(text: str, run: Path) -> Link:
    """One of the commands.

    Raises:
        UserError: it is none, or its options are wrong.
    """
    try:
        given = shlex.split(text)
    except ValueError as error:
        raise UserError(text, f"cannot be read ({error})", "Close the quote.") from None
    if given[:1] == ["dist-train"]:
        given = given[1:]
    command: Any = typer.main.get_command(cli.app)
    names: list[str] = []
    while hasattr(command, "commands"):
        name = given[len(names)] if len(names) < len(given) else ""
        known = sorted(command.commands)
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            problem = f"{name} is no command of dist-train" if name else "names no command"
            raise UserError(text, problem, f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}.")
        command = command.commands[name]
        names.append(name)
    words = [word.replace(RUN, str(run)) for word in given[len(names) :]]
    if not any(RUN in word for word in given):
        words = [*places(names[0], command, words, run), *words]
    help_ = f"See dist-train {' '.join(names)} --help."
    if "--help" in words:
        raise UserError(text, "asks for help", "Leave that option out.")
    try:
        params = command.make_context(" ".join(names), list(words)).params
    except UserError as error:
        raise UserError(text, f"{error.where}: {error.problem}", error.remedy) from None
    except USAGE_ERROR as error:
        raise UserError(text, " ".join(error.format_message().split()).rstrip("."), help_) from None
    if names == ["convert"] and params["dst"].exists():
        raise UserError(text, f"{params['dst']} exists already", "Remove it, or name another folder.")
    return Link((*names, *words), params)


def places(name: str, command: Any, words: list[str], run: Path) -> Iterator[str]:
    """Arguments that are understood: the run directory, and for convert a folder in it."""
    try:
        given = command.make_context(name, list(words), resilient_parsing=True).params
    except USAGE_ERROR:
        return  # told when it is checked in full
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    missing = [one for one in arguments if not given.get(one.name)]
    if name == "convert" and missing:
        yield str(run)
        if len(missing) == len(arguments):
            folder = re.sub(r"[^\w-]", "_", str(given.get("to") or "converted"))
            yield str(run / folder)
    elif arguments and missing == arguments and arguments[0].metavar in RUN_ARGUMENT:
        yield str(run)


def settings_of(link: Link, settings: LaunchSettings) -> LaunchSettings:
    """What a command asks for: a node's share of one rank."""
    share = {
        "nodes": "1",
        "ranks_per_node": 1,
        "gpus_per_node": min(settings.gpus_per_node, 1) if link.words[0] in ON_GPU else 0,
        "memory": share_of(settings.memory, settings.ranks),
        "exclusive": False,
    }
    return settings.model_copy(update=share)


def share_of(memory: str | None, ranks: int) -> str | None:
    """One rank's part of a node's memory; all of it (0) stays all of it."""
    match = re.fullmatch(r"(\d+)([KMGT]?)B?", memory or "", re.IGNORECASE)
    if match is None or memory is None:
        return memory
    kilobytes = int(match[1]) * 1024 ** " KMGT".index(match[2].upper() or "M") // 1024
    return f"{-(-kilobytes // ranks)}K" if kilobytes else memory


def executor_of(link: Link, record: LaunchRecord, settings: LaunchSettings, folder: Path, name: str) -> SlurmExecutor:
    """The executor for the job of a command, as yet without what it waits for."""
    asked = settings_of(link, settings)
    executor = plain_executor(asked, folder, f"{name}:{link.words[0]}")
    executor.update_parameters(setup=surroundings(record.code, asked))
    return executor


def check_chain(
    links: Sequence[Link], record: LaunchRecord, settings: LaunchSettings, folder: Path, name: str
) -> list[str]:
    """Asks Slurm whether it would take each. Returns their batch scripts.

    Raises:
        UserError: it would not.
    """
    scripts = []
    for number, link in enumerate(links, 1):
        scripts.append(script_of(executor_of(link, record, settings, folder, name)))
        script = record.path / f"then_{number}.sh"
        script.write_text(scripts[-1])
        try:
            test_only(script)
        except UserError as error:
            raise UserError(f"--then {shlex.join(link.words)!r}", f"sbatch: {error.problem}", error.remedy) from None
    return scripts


def submit_chain(
    links: Sequence[Link], record: LaunchRecord, settings: LaunchSettings, folder: Path, name: str, first: str
) -> list[ChainLink]:
    """Queues the commands behind the job `first`, each behind the one before it.

    Raises:
        UserError: Slurm refuses one; those before it are queued.
    """
    queued: list[ChainLink] = []
    for link in links:
        executor = executor_of(link, record, settings, folder, name)
        executor.update_parameters(dependency=f"afterok:{queued[-1].job if queued else first}")
        job = submit(executor, ChainJob(str(record.run), link.words))
        queued.append(ChainLink(command=link.command, job=job.job_id))
    return queued
