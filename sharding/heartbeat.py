"""How the training tells the watchdog, if there is one, where it is."""

from __future__ import annotations

from typing import Protocol


class Listener(Protocol):
    """What hears the beats."""

    def beat(self, phase: str, step: int | None, waits: bool) -> None:
        """See :func:`beat`."""


listeners: list[Listener] = []


def beat(phase: str, step: int | None = None, *, waits: bool = False) -> None:
    """This rank begins a phase; all ranks make the same beats within a step.

    Args:
        step: optimizer steps made so far, given where a step begins.
        waits: it begins to wait for other ranks.
    """
    for listener in listeners:
        listener.beat(phase, step, waits)
