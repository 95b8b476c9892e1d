"""Random changes to good files: a reader gives a result or a user's error, in bounded time, and writes nothing."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding import portable
from sharding.errors import UserError, UserErrors
from sharding.shards import load_dataset
from sharding.tar import members
from tests.security import forge
from tests.security.attempt import snapshot
from tools.manifest import read_manifest
from tools.shards import verify

# A place (as a share of the file), how many bytes go there, and what comes instead.
Edit = tuple[float, int, bytes]
ODD = [*(bytes([c]) for c in b'"{}[],:\n\0-\xff'), b"9" * 30, b"1e999", b"NaN", b"null", b"true", b"../"]
new = st.sampled_from(ODD) | st.binary(max_size=12)
edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 40), new), min_size=1, max_size=4)
# Any value in the place of any other: what stays valid JSON goes further into a reader.
leaves = st.none() | st.booleans() | st.integers() | st.integers(2**31, 2**66) | st.floats() | st.text(max_size=8)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))


def bounded(examples: int, slow: int) -> list[Any]:
    """A few examples always, many in the full run."""
    return [pytest.param(examples, id="few"), pytest.param(slow, id="many", marks=pytest.mark.slow)]


def mutated(data: bytes, changes: list[Edit]) -> bytes:
    for place, length, new in changes:
        start = int(place * len(data))
        data = data[:start] + new + data[start + length :]
    return data


def replaced(record: Any, places: list[int], value: Any) -> Any:
    """The record with one inner value changed, found by following `places` downwards."""
    if not places or not isinstance(record, dict | list) or not record:
        return value
    keys: list[Any] = list(record) if isinstance(record, dict) else list(range(len(record)))
    key = keys[places[0] % len(keys)]
    changed: Any = dict(record) if isinstance(record, dict) else list(record)
    changed[key] = replaced(record[key], places[1:], value)
    return changed


def survives(read: Callable[[Path], object], root: Path) -> None:
    """Nothing but a user's error may leave the reader, and nothing may be written."""
    before = snapshot(root)
    try:
        read(root)
    except (UserError, UserErrors) as error:
        assert str(error) and all(line.isprintable() for line in str(error).split("\n"))
    assert snapshot(root) == before


def fuzz(
    examples: int, build: Callable[[Path], object], names: list[str], read: Callable[[Path], object], *, of_json: bool
) -> None:
    """Tries a reader on `examples` changed copies of what `build` makes in a folder."""
    files = built(build)
    ways = st.builds(lambda changes: lambda data: mutated(data, changes), edits)
    if of_json:
        downwards = st.lists(st.integers(0, 40), max_size=7)
        ways |= st.builds(
            lambda places, value: lambda data: json.dumps(replaced(json.loads(data), places, value)).encode(),
            downwards,
            values,
        )

    @settings(max_examples=examples, deadline=None, database=None)
    @given(st.sampled_from(names), ways)
    def attempt(name: str, way: Callable[[bytes], bytes]) -> None:
        with tempfile.TemporaryDirectory() as place:
            for other, data in files.items():
                path = Path(place) / other
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(way(data) if other == name else data)
            survives(read, Path(place))

    attempt()


@cache
def built(build: Callable[[Path], object]) -> dict[str, bytes]:
    """The files that `build` makes, by their names."""
    with tempfile.TemporaryDirectory() as place:
        build(Path(place))
        return {str(path.relative_to(place)): path.read_bytes() for path in Path(place).rglob("*") if path.is_file()}


def build_manifests(folder: Path) -> None:
    rows = [("a", "some words", "0.5", "train"), ("b", "others", "-3", "valid"), ("c", "no, none", "2", "test")]
    lines = [f'{key},"{text}",{label},{split}' for key, text, label, split in rows]
    (folder / "m.csv").write_text("\n".join(["key,text,label,split", *lines]) + "\n")
    records = [dict(zip(("key", "text", "label", "split"), row, strict=True)) for row in rows]
    (folder / "m.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "m.json").write_text(json.dumps(records[0]))


def build_checkpoint(folder: Path) -> None:
    tensors = [("a", torch.ones(3)), ("b", torch.ones(2, 2))]
    portable.write(folder / "step", tensors, [(f"exp_avg.{name}", value) for name, value in tensors], {"adam_step": 1})


def read_checkpoint(folder: Path) -> None:
    held = portable.Portable(folder / "step")
    for kind in ("model", "optimizer"):
        assert all(value.dtype == torch.float32 for _, value in held.tensors(kind))


@pytest.mark.parametrize("examples", bounded(60, 800))
def test_shard_index(examples: int) -> None:
    names = ["shards/dataset.json", f"shards/{forge.INDEX}"]
    fuzz(examples, forge.good, names, lambda root: load_dataset(root / "shards"), of_json=True)


@pytest.mark.parametrize("examples", bounded(25, 300))
def test_verify(examples: int) -> None:
    names = ["shards/dataset.json", f"shards/{forge.INDEX}", f"shards/{forge.TAR}"]
    fuzz(examples, forge.good, names[:2], lambda root: verify(root / "shards"), of_json=True)
    fuzz(examples, forge.good, names[2:], lambda root: verify(root / "shards"), of_json=False)


@pytest.mark.parametrize("examples", bounded(60, 800))
def test_manifest_csv_and_jsonl(examples: int) -> None:
    def read(root: Path) -> None:
        for name in ("m.csv", "m.jsonl", "m.json"):
            survives(lambda folder, name=name: read_manifest(folder / name), root)  # type: ignore[misc]

    fuzz(examples, build_manifests, ["m.csv", "m.jsonl"], read, of_json=False)
    fuzz(examples, build_manifests, ["m.json"], read, of_json=True)


@pytest.mark.parametrize("examples", bounded(40, 500))
def test_portable_checkpoint(examples: int) -> None:
    fuzz(examples, build_checkpoint, ["step/manifest.json", "step/state.json"], read_checkpoint, of_json=True)


@pytest.mark.parametrize("examples", bounded(200, 5000))
def test_members_of_a_tar(examples: int) -> None:
    """Changed headers whose checksum nobody looks at: the members are whole, or it is a ValueError."""
    data = forge.pax({"path": "kk.txt"}) + forge.member("kk.json", b"{}")

    @settings(max_examples=examples, deadline=None, database=None)
    @given(edits)
    def attempt(changes: list[Edit]) -> None:
        hostile = mutated(data, changes)
        try:
            found = list(members(hostile))
        except ValueError:
            return
        assert sum(len(content) for _, content in found) <= len(hostile)
        assert len({name for name, _ in found}) == len(found)

    attempt()


@pytest.mark.parametrize("examples", bounded(60, 800))
def test_samples_behind_right_checksums(examples: int) -> None:
    """Tars that are changed before their checksums are taken, so that every reader behind them is reached."""
    data = forge.member("k.txt", b"words") + forge.member("k.vision.npy", forge.npy())

    @settings(max_examples=examples, deadline=None, database=None)
    @given(edits)
    def attempt(changes: list[Edit]) -> None:
        with tempfile.TemporaryDirectory() as place:
            forge.shards(Path(place), {"k": mutated(data, changes)}, {"vision": 5})
            survives(lambda root: verify(root / "shards"), Path(place))

    attempt()
