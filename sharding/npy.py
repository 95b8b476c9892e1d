"""Arrays out of .npy files that somebody else may have made: never pickled, never larger than their bytes."""

from __future__ import annotations

import math
import tokenize
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

_PARSE = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
# What a literal of Python can raise that is too deep or no literal at all.
_NO_HEADER = (ValueError, TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError, EOFError)


def read_npy(file: BinaryIO, size: int) -> np.ndarray:
    """The array of a .npy file of real numbers.

    Args:
        file: at its start.
        size: of the file in bytes.

    Raises:
        ValueError: what is wrong with it, as what follows the file's name.
    """
    read_shape(file, size)
    file.seek(0)
    array = np.load(file, allow_pickle=False)
    assert isinstance(array, np.ndarray)
    return array


def read_shape(file: BinaryIO, size: int) -> tuple[int, ...]:
    """The shape alone; see `read_npy`."""
    magic = file.read(npy.MAGIC_LEN)
    if magic.startswith(b"PK"):
        raise ValueError("is an archive, not a single array")
    if len(magic) < npy.MAGIC_LEN or not magic.startswith(npy.MAGIC_PREFIX) or (magic[6], magic[7]) not in _PARSE:
        raise ValueError("is no .npy file")
    try:
        shape, _, dtype = _PARSE[magic[6], magic[7]](file)
    except _NO_HEADER:
        raise ValueError("has a damaged .npy header") from None
    if dtype.hasobject:
        raise ValueError("holds pickled objects, which are never loaded")
    if dtype.kind not in "fiu":
        raise ValueError(f"has type {dtype}, which is not real numbers")
    declared, held = math.prod(shape) * dtype.itemsize, size - file.tell()
    if any(length < 0 for length in shape):
        raise ValueError("has a damaged .npy header")
    if declared > held:
        raise ValueError(f"is truncated or lies: it declares {declared} bytes of numbers and holds {held}")
    return shape
