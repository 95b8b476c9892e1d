"""What a row of the tables of hostile input says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.security.attempt import Reader, Words


@dataclass(frozen=True)
class Case:
    """One hostile input.

    Args:
        name: what is hostile about it.
        make: lays it into an empty folder and tells what is tried there.
        says: what the errors must say, one regular expression per line of them.
        page: for a reader that leaves out what is damaged and goes on (the report): what its page must say instead.
    """

    name: str
    make: Callable[[Path], Words | Reader]
    says: tuple[str, ...] = ()
    page: tuple[str, ...] = ()
