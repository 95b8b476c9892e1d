"""Tensors of mapped files, one in memory at a time."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SMALL = 1 << 20  # bytes not worth a call
madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None


class Mapped:
    """Puts together tensors of mapped files, and gives back the memory of the last one's pages at the next: a process
    then holds one tensor, not all that it has ever read.
    """

    def __init__(self) -> None:
        self._last: list[Tensor] = []
        self._versions: dict[int, int] = {}  # of each storage when it was first seen: torch counts what is written

    def joined(self, parts: list[Tensor], shape: torch.Size) -> Tensor:
        """The first elements of the flat parts, in a shape; without a copy where there is one part.

        Raises:
            RuntimeError: they have fewer.
        """
        for part in self._last:
            if self._versions[part.untyped_storage().data_ptr()] == part._version:
                give_back(part)
        self._last = parts = [part.detach() for part in parts]
        for part in parts:
            self._versions.setdefault(part.untyped_storage().data_ptr(), part._version)
        whole = parts[0] if len(parts) == 1 else together(parts)
        return whole if whole.shape == shape else whole[: shape.numel()].view(shape)


def together(parts: list[Tensor]) -> Tensor:
    """torch.cat of flattened parts by one thread (torch's would wait for each other where cores are busy), into large
    pages, which cost a fault per 2 MiB instead of one per 4 KiB.
    """
    whole = torch.empty(sum(part.numel() for part in parts), dtype=parts[0].dtype)
    advise(whole, "MADV_HUGEPAGE")
    bytes_of = [part.flatten().view(torch.uint8).numpy() for part in parts]
    np.concatenate(bytes_of, out=whole.view(torch.uint8).numpy())
    return whole


def give_back(tensor: Tensor) -> None:
    """Takes a tensor's pages out of this process's memory if they are a file's, to be read again from there."""
    if tensor.nbytes >= SMALL and tensor.is_contiguous() and of_file(*pages(tensor)):
        advise(tensor, "MADV_DONTNEED")


def advise(tensor: Tensor, what: str) -> None:
    """Tells the kernel something of the whole pages of a contiguous tensor, where there is such a call."""
    start, end = pages(tensor)
    if madvise is not None and hasattr(mmap, what) and end > start:
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), getattr(mmap, what))


def pages(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first whole page of a contiguous tensor, and of what follows the last."""
    page = mmap.PAGESIZE
    return -(-tensor.data_ptr() // page) * page, (tensor.data_ptr() + tensor.nbytes) // page * page


def of_file(start: int, end: int) -> bool:
    """Whether addresses lie in a mapped file."""
    if madvise is None:
        return False
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, inode, *_ = line.split(maxsplit=5)
        first, last = (int(address, 16) for address in span.split("-"))
        if first <= start and end <= last:
            return inode != "0"
    return False
