"""The restricted unpickler: equal to pickle on what is harmless, and nothing of the rest is called."""

import contextlib
import os
import pickle
import pickletools
import struct
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sharding.errors import UserError
from tools.imports.numpy_pickle import load_pickle

TYPES = arrays.integer_dtypes() | arrays.floating_dtypes(endianness="?") | arrays.unicode_string_dtypes()
ARRAYS = arrays.arrays(TYPES | arrays.byte_string_dtypes(), arrays.array_shapes(min_dims=0, max_dims=3, min_side=0))
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | ARRAYS
KEYS = st.text() | st.integers() | st.binary()
TREES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner), max_leaves=8)


def same(one, other):
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and one.tobytes() == other.tobytes()
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and repr(one) == repr(other)


@given(TREES, st.integers(0, 5))
def test_harmless_pickles_are_read(tmp_path_factory, tree, protocol):
    path = tmp_path_factory.getbasetemp() / "tree.pkl"
    path.write_bytes(pickle.dumps(tree, protocol))
    assert same(pickle.loads(path.read_bytes()), load_pickle(path))


def test_scalars_objects_and_fortran_order(tmp_path):
    held: dict[str, Any] = {
        "scalar": np.float32(1.5),
        "objects": np.array([{"a": 1}, "x", None], dtype=object),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "ordered": OrderedDict(b=1, a=2),
    }
    for protocol in range(6):
        (tmp_path / "p").write_bytes(pickle.dumps(held, protocol))
        found = load_pickle(tmp_path / "p")
        assert found["scalar"] == 1.5 and found["objects"].tolist() == held["objects"].tolist()
        assert np.array_equal(found["fortran"], held["fortran"]) and list(found["ordered"]) == ["b", "a"]


class Calls:
    def __init__(self, function, *args):
        self.called = function, args

    def __reduce__(self):
        return self.called


def _forged_array(dtype_state, shape, data):
    """A pickle of numpy's own calls whose states say what is given."""
    dtype = b"cnumpy\ndtype\n(X\x02\x00\x00\x00V8I00\nI01\ntR"
    dtype = dtype if dtype_state is None else dtype + pickle.dumps(dtype_state, 2)[2:-1] + b"b"
    start = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntC\x01bt\x52"
    state = b"(I1\n" + pickle.dumps(shape, 2)[2:-1] + dtype + b"I00\n" + pickle.dumps(data, 3)[2:-1] + b"tb."
    return b"\x80\x03" + start + state


HOSTILE = {
    "os.system": lambda canary: pickle.dumps({"train": Calls(os.system, f"touch {canary}")}),
    "builtins.eval": lambda canary: pickle.dumps([Calls(eval, f"open({str(canary)!r}, 'w')")], 0),
    "numpy loads a pickle": lambda canary: pickle.dumps(Calls(np.load, str(canary), None, True)),
    "a record of objects": lambda canary: _forged_array(
        (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0), (1,), b"A" * 8
    ),
    "a record": lambda canary: _forged_array(None, (1,), b"A" * 8),
    "an array that lies": lambda canary: pickle.dumps(np.zeros(3)).replace(b"K\x03\x85", b"K\x7f\x85"),
    "objects in bytes": lambda canary: pickle.dumps(np.zeros(8)).replace(b"f8", b"O8"),
    "a length that lies": lambda canary: b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"x.",
    "an index that lies": lambda canary: b"\x80\x02Nr" + struct.pack("<I", 0xFFFFFFFF) + b"q\x00h\x01.",
    "a deep key": lambda canary: b"\x80\x02})" + b"\x85" * 10**6 + b"Ns.",
    "an extension": lambda canary: b"\x80\x02\x82\x01.",
    "a persistent object": lambda canary: b"\x80\x02X\x01\x00\x00\x00xQ.",
    "state of a dict": lambda canary: b"\x80\x02}}b.",
    "a new object": lambda canary: b"\x80\x02cnumpy\nndarray\n(K\x05t\x81.",
    "a call of a string": lambda canary: b"\x80\x02cnumpy\nndarray\n(K\x05tR.",
    "nothing": lambda canary: b"",
    "text": lambda canary: b"key,label\n",
    "a protocol of tomorrow": lambda canary: b"\x80\x63N.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused(tmp_path, name):
    canary = tmp_path / "ran"
    (tmp_path / "p").write_bytes(HOSTILE[name](canary))
    with pytest.raises(UserError) as caught:
        load_pickle(tmp_path / "p")
    assert not canary.exists() and len(str(caught.value)) < 1000


WHOLE = pickle.dumps({"train": {"id": np.array(["a", "b"]), "text": ["x", 1.5], "audio": np.zeros((2, 3))}})


@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_damage_is_told_or_harmless(tmp_path_factory, changes):
    data = bytearray(WHOLE)
    for position, value in changes:
        data[position] = value
    path = tmp_path_factory.getbasetemp() / "damaged.pkl"
    path.write_bytes(data)
    with contextlib.suppress(UserError):
        load_pickle(path)


def test_any_cut_is_told(tmp_path):
    whole = pickle.dumps({"train": {"id": ["a", "b"], "audio": np.zeros((2, 3))}})
    ends = [position for _, _, position in pickletools.genops(whole) if position]
    for cut in ends:
        (tmp_path / "p").write_bytes(whole[:cut])
        with pytest.raises(UserError, match="damaged or truncated"):
            load_pickle(tmp_path / "p")
