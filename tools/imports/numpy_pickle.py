"""Foreign pickles of numpy arrays and plain values. Nothing in them is called: what they name is built here, checked.

numpy's own constructors are not given to them either: a record type that lies about its fields makes numpy follow
pointers out of the file.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from sharding.errors import UserError
from sharding.files import opened

MOST_MEMBER = 1 << 31  # bytes of one array of an archive, unpacked; labels have a few megabytes
_PLAIN_TYPE = re.compile(r"[biufSUO]\d{0,9}")
_OF_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
_ARRAY = "numpy.ndarray"  # what a pickle gets for the class, to hand it to _reconstruct
REMEDY = "Save plain dicts, lists, strings, numbers and numpy arrays"
_BROKEN = (
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, OverflowError, RecursionError),
    *(pickle.UnpicklingError, MemoryError, UnicodeError),
)


class _Refused(Exception):
    """What a pickle asks for that is not given."""


class _Type:
    """A numpy.dtype that is being unpickled."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not _PLAIN_TYPE.fullmatch(code):
            raise _Refused(f"numpy.dtype({code!r})" if isinstance(code, str) else "a numpy.dtype of parts")
        self.dtype = np.dtype("O" if code.startswith("O") else code)

    def set_state(self, state: Any) -> None:
        if any(part is not None for part in state[2:5]):
            raise _Refused("a numpy.dtype with fields")
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


def _reconstruct(kind: Any, *_: Any) -> np.ndarray:
    if kind != _ARRAY:
        raise _Refused("an array of another class")
    return np.ndarray((0,), np.int8)


def _fill(array: np.ndarray, state: Any) -> None:
    """What ndarray.__setstate__ does, after looking whether the state is true."""
    *_, shape, kind, fortran, data = state
    dtype = kind.dtype
    count = math.prod(_checked_shape(shape))
    data = data.encode("latin1") if isinstance(data, str) else data  # of Python 2
    held = len(data)
    if (isinstance(data, list) != (dtype.kind == "O")) or held != count * (1 if dtype.kind == "O" else dtype.itemsize):
        raise ValueError(f"an array of shape {shape} holds {held} bytes or objects")
    array.__setstate__((1, shape, dtype, fortran is True, data))  # type: ignore[arg-type]


def _checked_shape(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, tuple) or not all(isinstance(n, int) and 0 <= n < 1 << 48 for n in shape):
        raise ValueError("an array of impossible shape")  # not printed: a few bytes may stand for endless nested text
    return shape


def _from_buffer(data: Any, kind: Any, shape: Any, order: Any) -> np.ndarray:
    if kind.dtype.kind == "O" or order not in ("C", "F"):
        raise ValueError("a buffer of objects")
    return np.frombuffer(data, kind.dtype).reshape(_checked_shape(shape), order=order)


def _scalar(kind: Any, data: Any) -> Any:
    if kind.dtype.kind == "O":
        raise _Refused("a scalar of objects")
    data = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(data, kind.dtype, count=1)[0]


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """How protocols 0 to 2 hold bytes."""
    if encoding != "latin1" or not isinstance(text, str):
        raise _Refused("_codecs.encode to another encoding")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """How protocols 0 to 2 hold none."""
    return b""


_GLOBALS: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): _ARRAY,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    ("collections", "OrderedDict"): OrderedDict,
    **{(module, "_reconstruct"): _reconstruct for module in _OF_NUMPY},
    **{(module, "scalar"): _scalar for module in _OF_NUMPY},
    **{(module, "_frombuffer"): _from_buffer for module in _OF_NUMPY},
}


_Python: Any = pickle._Unpickler  # its stack is no public name


class _Unpickler(_Python):
    """Python's own, not the one in C: that takes as much memory as an index in the file says."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _GLOBALS:
            raise _Refused(f"{module}.{name}")
        return _GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("a persistent object")

    def load_reduce(self) -> None:
        args = self.stack.pop()
        called = self.stack[-1]
        if called not in _GLOBALS.values() or called is _ARRAY or (called is OrderedDict and args):
            raise _Refused(f"a call of a {type(called).__name__}")
        self.stack[-1] = called(*args)

    def load_build(self) -> None:
        state, built = self.stack.pop(), self.stack[-1]
        if isinstance(built, _Type):
            built.set_state(state)
        elif isinstance(built, np.ndarray):
            _fill(built, state)
        else:
            raise _Refused(f"state of {type(built).__name__}")

    def load_setitem(self) -> None:
        self._set(self.stack[-3], self.stack[-2:])
        del self.stack[-2:]

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._set(self.stack[-1], items)

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set(self.stack[-1], items)

    def _set(self, target: Any, items: list[Any]) -> None:
        if type(target) not in (dict, OrderedDict):
            raise _Refused(f"items of {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | bytes | int | float | None):  # hashing a deep tuple overflows the stack of C
                raise _Refused(f"a dict with a {type(key).__name__} as key")
            target[key] = value

    dispatch = {  # noqa: RUF012 (as in the base class)
        **_Python.dispatch,
        pickle.REDUCE[0]: load_reduce,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
    }


for _code in (pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4):
    del _Unpickler.dispatch[_code[0]]
for _code in (pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER):
    del _Unpickler.dispatch[_code[0]]


class _Bounded:
    """A file that is not asked for more than it has: a length in a pickle may lie."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size

    def read(self, count: int) -> bytes:
        if count > self._size - self._file.tell():
            raise EOFError("it ends too early")
        return self._file.read(count)

    def readline(self) -> bytes:
        return self._file.readline(1 << 20)

    def readinto(self, buffer: Any) -> int:
        if len(buffer) > self._size - self._file.tell():
            raise EOFError("it ends too early")
        return self._file.readinto(buffer)  # type: ignore[attr-defined]


def load_pickle(path: Path) -> Any:
    """The dicts, lists, strings, numbers and arrays of a pickle; strings of Python 2 are taken as Latin-1.

    Raises:
        UserError: truncated, damaged, or it asks for anything else; names what.
    """
    try:
        with opened(path, REMEDY) as (file, size):
            return _load(file, size, str(path))
    except OSError as error:
        raise UserError(str(path), f"cannot be read ({error.strerror})", "Name a readable pickle") from None


def load_archive(path: Path) -> dict[str, Any]:
    """The members of an .npz by name, arrays of objects included, single ones as the object itself.

    Raises:
        UserError: see `load_pickle`.
    """
    found: dict[str, Any] = {}
    try:
        with opened(path, "Name an .npz file") as (file, _), zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                where = f"{path}, {entry.filename}"
                if entry.file_size > MOST_MEMBER:
                    raise UserError(where, f"has {entry.file_size} bytes, at most {MOST_MEMBER} are read", REMEDY)
                with archive.open(entry) as member:
                    data = member.read(entry.file_size)
                found[entry.filename.removesuffix(".npy")] = _member(data, where)
    except OSError as error:
        raise UserError(str(path), f"cannot be read ({error.strerror})", "Name an .npz file") from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, zlib.error) as error:
        raise UserError(str(path), f"is damaged, or no .npz file ({error})", "Copy it again") from None
    return found


def _member(data: bytes, where: str) -> Any:
    stream = io.BytesIO(data)
    try:
        major, _ = npy.read_magic(stream)
        header = npy.read_array_header_1_0 if major == 1 else npy.read_array_header_2_0
        shape, _, dtype = header(stream)
    except _BROKEN as error:
        raise UserError(where, f"is no array ({error})", "Copy the file again") from None
    if dtype != np.dtype("O"):
        stream.seek(0)
        try:
            return np.load(stream, allow_pickle=False)
        except _BROKEN as error:
            raise UserError(where, f"is no array ({error})", "Copy the file again") from None
    held = _load(stream, len(data), where)
    return held.item() if isinstance(held, np.ndarray) and shape == () else held


def _load(file: BinaryIO, size: int, where: str) -> Any:
    try:
        return _Unpickler(_Bounded(file, size), encoding="latin1").load()
    except _Refused as asked:
        problem = f"is refused: to read it, {asked} would have to be made, and a foreign pickle may run anything"
        raise UserError(where, problem, REMEDY) from None
    except _BROKEN as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(where, f"cannot be read, damaged or truncated ({reason})", "Copy the file again") from None
