"""A request to stop: the handler only sets a flag, the loop acts on it at a step boundary."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class StopFlag:
    """While entered, SIGINT, SIGTERM and SIGUSR2 raise it; forked data workers are unaffected.

    Args:
        deadline: seconds since the epoch from when on it is raised without a signal, which layers between a scheduler
            and this process may lose.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self.deadline = deadline
        self._signalled = False
        self._owner = os.getpid()
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopFlag:
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._owner:
            self._signalled = True

    @property
    def raised(self) -> bool:
        """Whether to stop."""
        return self._signalled or (self.deadline is not None and time.time() >= self.deadline)


@contextmanager
def interrupt_blocked() -> Iterator[None]:
    """Processes started inside never see Ctrl-C, which is this process's to handle: they inherit the mask for good."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
