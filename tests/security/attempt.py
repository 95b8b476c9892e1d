"""One command on hostile input, in a process of its own with bounds on time and memory; and what it did.

A fork server that has imported the commands' code once gives each case a fresh process in milliseconds.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT_SECONDS = 120  # on the clock, for a case that waits for something, such as a FIFO
LIMIT_CPU_SECONDS = 20  # the slowest case takes 3; other tests may share the cores
LIMIT_BYTES = 1 << 30  # that the process may take above what the imported code takes
PRELOADED = ("dist_train.cli", "dist_train.recipe", "dist_train.report", "dist_train.plan_search", "tools.shards")

# A command of `dist-train`, or a reader that has no quick command of its own; both print errors as the command does.
Words = Sequence[str | Path]
Reader = Callable[[Path], object]


@dataclass(frozen=True)
class Outcome:
    """Exit code (None: it did not end, negative: the signal that ended it) and what was printed."""

    code: int | None
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """What follows `error: ` on the lines of stderr."""
        return [line.removeprefix("error: ") for line in self.err.splitlines() if line.startswith("error: ")]


def attempt(what: Words | Reader, folder: Path, scratch: Path) -> Outcome:
    """Tries a command or a reader.

    Args:
        what: words after `dist-train`, or a module's function that gets `folder`.
        folder: working directory.
        scratch: takes stdout and stderr.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, __name__])
    process = context.Process(target=_child, args=(what, folder, scratch))
    process.start()
    process.join(LIMIT_SECONDS)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    printed = [(scratch / name).read_text(errors="replace") for name in ("stdout", "stderr")]
    return Outcome(code, *printed)


def _child(what: Words | Reader, folder: Path, scratch: Path) -> None:
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        place = os.devnull if name == "stdin" else str(scratch / name)
        descriptor = os.open(place, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = os.fdopen(0)
    os.chdir(folder)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["DIST_TRAIN_CANARY"] = CANARY
    cli: Any = importlib.import_module("dist_train.cli")
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + LIMIT_BYTES, taken + LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_CPU_SECONDS, LIMIT_CPU_SECONDS + 5))
    if callable(what):
        cli.app = lambda: what(folder)
        cli.main()
    else:
        cli.main(args=list(map(str, what)), prog_name="dist-train")


CANARY = "c4n4ry-that-no-message-may-hold"  # content of the files and the variable that nothing may tell


def snapshot(root: Path) -> dict[str, object]:
    """Every entry below a directory: kind, mode, and content or target."""
    return {str(path.relative_to(root)): _entry(path) for path in sorted(_walk(root))}


def _walk(root: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(root):
        yield from (Path(place) / name for name in (*folders, *files))


def _entry(path: Path) -> object:
    mode = path.lstat().st_mode
    if path.is_symlink():
        return mode, str(path.readlink())
    if path.is_file() and path.stat().st_size < LIMIT_BYTES:
        return mode, path.read_bytes()
    return mode, path.stat().st_size, path.stat().st_mtime_ns
