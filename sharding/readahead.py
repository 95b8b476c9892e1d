"""Reading a window's bytes in the order of the disk, ahead of those who decode its samples.

A windowed order asks for the samples of a window in any order; a cold disk or network file system wants to be read
from front to back. One thread per rank reads the byte ranges of the window that comes next, tar by tar, from low
offsets to high, while the present window is consumed. What it reads is dropped: it stays in the page cache of the node,
where this rank's loader processes find it. The page cache has to hold two windows of the ranks of a node; with less,
samples are read from the disk once more, at random, and nothing else changes.

Each rank reads the ranges of its own samples, so a window crosses the network once and not once per node. With one rank
they are whole blocks; with more, the ranks of a node read interleaved ranges of the same blocks at the same time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from sharding.table import Table

GAP = 2**20  # bytes: reading so much more takes about as long as one more request to a network file system
PIECE = 2**22  # bytes per call


class Readahead:
    """Reads ranges ahead, one window at a time.

    Args:
        table: index of the split.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        self._closed = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="readahead")  # its thread starts with the first window

    def start(self, samples: np.ndarray) -> Future[None]:
        """Reads these samples' bytes once what was asked before is read; the result is there when they are."""
        return self._pool.submit(self._read, samples)

    def close(self) -> None:
        """Stops soon."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, samples: np.ndarray) -> None:
        buffer = bytearray(PIECE)
        for path, ranges in byte_ranges(self.table, samples):
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError:
                continue  # told by whoever needs the sample
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
                for start, end in ranges:
                    for offset in range(start, end, PIECE):
                        if self._closed:
                            return
                        os.preadv(descriptor, [memoryview(buffer)[: end - offset]], offset)
            except OSError:
                continue
            finally:
                os.close(descriptor)


def byte_ranges(table: Table, samples: np.ndarray) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Of each tar that holds some of the samples, the ranges to read: ascending, those closer than GAP joined.

    Args:
        table: index of the split.
        samples: int [n], positions in it.
    """
    samples = samples[np.lexsort((table.offset[samples], table.tar[samples]))]
    tars, starts = table.tar[samples], table.offset[samples]
    ends = starts + table.size[samples]
    for tar in np.unique(tars):
        first, last = np.searchsorted(tars, [tar, tar + 1])
        here, there = starts[first:last], ends[first:last]
        breaks = np.flatnonzero(here[1:] - there[:-1] > GAP)
        begins = here[np.r_[0, breaks + 1]].tolist()
        yield table.tars[tar], list(zip(begins, there[np.r_[breaks, len(there) - 1]].tolist(), strict=True))
