"""Reading small files that somebody else may have made."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sharding.errors import UserError

MOST_JSON = 1 << 30  # bytes; the index of a tar of a million samples has a third of it
MOST_YAML = 1 << 18  # bytes; the longest recipe of ours has 4 KiB, and YAML is parsed in Python


def read_bounded(path: Path, most: int, remedy: str) -> bytes:
    """The bytes of a regular file. A device may never end, a FIFO never begin, a sparse file hold terabytes.

    Args:
        most: bytes it may have.
        remedy: of the error.

    Raises:
        UserError: it is no regular file, or larger.
        OSError: it cannot be read.
    """
    with opened(path, remedy) as (file, size):
        if size > most:
            raise UserError(str(path), f"has {size} bytes, at most {most} are read", remedy)
        return file.read(size)


def read_tail(path: Path, most: int, remedy: str) -> bytes:
    """The last bytes of a regular file, at most `most`; a line whose beginning is left out is left out, too.

    Raises:
        UserError: it is no regular file.
        OSError: it cannot be read.
    """
    with opened(path, remedy) as (file, size):
        file.seek(max(size - most, 0))
        text = file.read(most)
    return text.partition(b"\n")[2] if size > most and b"\n" in text else text


@contextmanager
def opened(path: Path, remedy: str) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file, and its size."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # does not wait for the writer of a FIFO
    try:
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(found.st_mode):
            raise UserError(str(path), "is not a regular file", remedy)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            yield file, found.st_size
    finally:
        os.close(descriptor)
