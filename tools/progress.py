"""The bar that long work shows on stderr."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


def progress_bar() -> Progress:
    """A bar with count and remaining time."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def tracked(items: Collection[T], description: str) -> Iterator[T]:
    """The items, one by one, with a bar."""
    with progress_bar() as progress:
        yield from progress.track(items, description=description)
