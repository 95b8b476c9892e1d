"""Where the time of a step goes: named phases, measured without making the device wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.profiler import record_function

from sharding.clock import between, now
from sharding.heartbeat import beat


class Phases:
    """Seconds per phase since the last reading; a phase inside another counts only as the inner one.

    On a GPU the times are those of its own clock, between events in its stream; they are read at the end of a step,
    when the device has to be waited for anyway.
    """

    def __init__(self) -> None:
        self._spans: list[tuple[str, Any, Any, int | None]] = []  # name, start, end, index of the enclosing span
        self._open: list[int] = []

    def start(self, name: str) -> None:
        """Opens a phase."""
        outer = self._open[-1] if self._open else None
        self._open.append(len(self._spans))
        self._spans.append((name, now(), None, outer))

    def stop(self) -> None:
        """Closes the phase opened last."""
        index = self._open.pop()
        name, start, _, outer = self._spans[index]
        self._spans[index] = (name, start, now(), outer)

    def read(self) -> dict[str, float]:
        """Seconds by phase; starts anew. No phase may be open."""
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        seconds: dict[str, float] = {}
        for name, start, end, outer in self._spans:
            length = between(start, end)
            seconds[name] = seconds.get(name, 0.0) + length
            if outer is not None:
                around = self._spans[outer][0]
                seconds[around] = seconds.get(around, 0.0) - length
        self._spans = []
        return seconds


_current: ContextVar[Phases | None] = ContextVar("phases", default=None)


@contextmanager
def measured(phases: Phases) -> Iterator[None]:
    """Phases entered in this block are counted in `phases`."""
    token = _current.set(phases)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A part of a step, by this name in the measurement (if one is on), in profiler traces and for the watchdog."""
    phases = _current.get()
    beat(name)
    with record_function(name):
        if phases is None:
            yield
            return
        phases.start(name)
        try:
            yield
        finally:
            phases.stop()
