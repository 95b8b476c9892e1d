"""A command on a terminal of its own, as a user has it: what it shows, and keys pressed."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.end_to_end.commands import command

LIMIT = 60.0  # seconds for anything to be shown


class Terminal:
    """The user's side of it."""

    def __init__(self, process: subprocess.Popen[bytes], screen: int) -> None:
        self.process, self.screen, self.shown = process, screen, ""

    def until(self, text: str) -> None:
        """Waits until it shows that, after what was waited for before.

        Raises:
            AssertionError: it ended, or never showed it.
        """
        deadline = time.monotonic() + LIMIT
        while text not in self.shown:
            assert time.monotonic() < deadline and self._read(), f"{text!r} was never shown: {self.shown}"
        self.shown = self.shown.partition(text)[2]

    def press(self, key: str) -> None:
        """Sends a key."""
        os.write(self.screen, key.encode())

    def end(self) -> tuple[int, str]:
        """Waits until it ends; its exit code, and all shown since."""
        deadline = time.monotonic() + LIMIT
        while self._read():
            assert time.monotonic() < deadline, f"it did not end: {self.shown}"
        return self.process.wait(LIMIT), self.shown

    def _read(self) -> bool:
        if select.select([self.screen], [], [], 0.1)[0]:
            try:
                read = os.read(self.screen, 1 << 16)
            except OSError:  # nobody has the other side any more
                return False
            self.shown += read.decode(errors="replace")
            return bool(read)
        return True


@contextmanager
def on_terminal(*words: str | Path) -> Iterator[Terminal]:
    """Runs `dist-train` while the block does."""
    screen, side = pty.openpty()

    def take() -> None:
        fcntl.ioctl(side, termios.TIOCSCTTY, 0)  # Ctrl-C becomes SIGINT for what runs on it
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # background jobs, as tests may be, ignore it

    process = subprocess.Popen(
        command(*words),
        stdin=side,
        stdout=side,
        stderr=side,
        start_new_session=True,
        preexec_fn=take,  # noqa: PLW1509
        env={**os.environ, "COLUMNS": "160", "LINES": "50"},
    )
    os.close(side)
    try:
        yield Terminal(process, screen)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.wait()
        os.close(screen)
