"""`dist-train` in a rank that kills itself at a chosen moment: `python -m tests.faults.rank KIND NUMBER train …`.

KIND is a phase as the watchdog hears it (`forward`, `saving`, `evaluation` …), `write` (a moment inside the writing of
a checkpoint's file, NUMBER microseconds after its begin), `rename` or `renamed` (just before or after one), or `never`.
The NUMBER-th time the process sends itself SIGKILL.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_train.cli import main
from sharding import portable
from sharding.heartbeat import listeners


def die() -> None:
    """Ends this process as the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


class Trap:
    """Counts, and dies at the end of the count."""

    def __init__(self, phase: str, number: int) -> None:
        self.phase, self.left = phase, number

    def beat(self, phase: str, step: int | None, waits: bool) -> None:
        """One of the moments that count, or not."""
        if phase == self.phase and not waits:
            self.left -= 1
            if self.left == 0:
                die()


def trapped(action: Callable[..., Any], number: int, *, before: bool) -> Callable[..., Any]:
    """The action, with death before or after its `number`-th time."""
    left = number

    def act(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0 and before:
            die()
        result = action(*arguments, **options)
        if left == 0:
            die()
        return result

    return act


def arm(kind: str, number: int) -> None:
    """Sets the trap."""
    if kind == "write":
        real = portable.write_part

        def write_part(*arguments: Any) -> Any:
            threading.Timer(number / 1e6, die).start()
            return real(*arguments)

        portable.write_part = write_part  # type: ignore[assignment]
    elif kind in ("rename", "renamed"):
        for name in ("rename", "replace"):
            setattr(Path, name, trapped(getattr(Path, name), number, before=kind == "rename"))
    elif kind != "never":
        listeners.append(Trap(kind, number))


if __name__ == "__main__":
    arm(sys.argv[1], int(sys.argv[2]))
    del sys.argv[1:3]
    main()
