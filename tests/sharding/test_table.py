"""The columns of a split: the same as its indexes say, and used only while they are whole and of these."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.errors import UserError
from sharding.shards import Columns, load_dataset, load_info
from sharding.stream import ShardedSplit
from sharding.table import Keys, Lengths, columns_path, filled, open_table, read_columns, table_of
from tests.corpus import random_sample, write_corpus


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng()
    keys = [f"k{number}" for number in rng.choice(1000, 20, replace=False)] + ["schöne Grüße", "日本", "k" * 150]
    write_corpus(tmp_path / "out", [random_sample(rng, key) for key in rng.permutation(keys).tolist()], 5)
    return tmp_path / "out"


def kept(root):
    return read_columns(root, "train", load_info(root).splits["train"])


def test_columns_repeat_the_indexes(root):
    indexes = load_dataset(root).indexes["train"]
    table = kept(root)
    assert table.equals(table_of(root, indexes)) and len(table) == 23
    rows = {
        key: {name: getattr(index.columns, name)[i] for name in Columns.model_fields} | {"tar": index.tar}
        for index in indexes
        for i, key in enumerate(index.columns.key)
    }
    assert list(table.key) == sorted(rows)
    for i, key in enumerate(sorted(rows)):
        found = {name: getattr(table, name)[i] for name in Columns.model_fields}
        found |= {"sha256": table.sha256[i].tobytes().hex(), "tar": Path(table.tars[table.tar[i]]).name}
        assert found == rows[key]
        assert all(type(found[name]) is type(rows[key][name]) for name in rows[key] if name.endswith(("frames", "rs")))


def test_shards_without_columns_open_too(root):
    whole = ShardedSplit(root, "train")
    columns_path(root, "train").unlink()
    assert kept(root) is None
    other = ShardedSplit(root, "train")
    assert other.columns.equals(whole.columns) and other[3]["label"] == whole[3]["label"]


@pytest.mark.parametrize("seed", range(8))
def test_damaged_columns_are_not_used(root, seed):
    rng = np.random.default_rng()
    path = columns_path(root, "train")
    good, data = kept(root), bytearray(path.read_bytes())
    place = int(rng.integers(len(data)))
    data[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(data if seed else data[:place])
    found = kept(root)
    assert found is None or found.equals(good)  # a bit of the header that says nothing, such as a blank
    assert open_table(root, "train")[1].equals(good)


def test_columns_of_other_shards_are_not_used(root, tmp_path):
    write_corpus(tmp_path / "other", [random_sample(np.random.default_rng(), f"x{i}") for i in range(23)], 5)
    shutil.copy(columns_path(tmp_path / "other", "train"), columns_path(root, "train"))
    assert kept(root) is None
    assert ShardedSplit(root, "train").keys[0][0] != "x"


@pytest.mark.parametrize("damage", ["tar", "index", "no tar", "no index"])
def test_what_the_columns_were_made_of_has_changed(root, damage):
    tar = root / "train-000001.tar"
    index = root / "train-000001.tar.index.json"
    if damage.startswith("no"):
        (tar if damage == "no tar" else index).unlink()
    elif damage == "tar":
        tar.write_bytes(tar.read_bytes()[:-512])
    else:
        record = json.loads(index.read_text())
        record["columns"]["size"].pop()
        index.write_text(json.dumps(record))
    assert kept(root) is None
    with pytest.raises(UserError, match=r"is truncated|do not fit|is missing"):
        ShardedSplit(root, "train")


def test_a_key_twice_is_told(tmp_path):
    sample = random_sample(np.random.default_rng(), "twice")
    write_corpus(tmp_path / "out", [sample, sample], 1)
    with pytest.raises(UserError, match="holds a key twice"):
        ShardedSplit(tmp_path / "out", "train")


def test_order_on_the_disk(tmp_path):
    samples = [random_sample(np.random.default_rng(), f"k{i}") for i in range(9)]
    for name, order, expected in (("a", [*range(9)], True), ("b", [0, 2, 1, *range(3, 9)], False)):
        write_corpus(tmp_path / name, [samples[i] for i in order], 4)
        assert open_table(tmp_path / name, "train")[1].in_order is expected
    write_corpus(tmp_path / "c", samples[4:] + samples[:4], 4)  # in order within each tar
    assert not open_table(tmp_path / "c", "train")[1].in_order


@given(st.lists(st.text(max_size=5)))
def test_keys_are_a_sequence(names):
    keys = Keys.of(names)
    assert list(keys) == names == keys and len(keys) == len(names) and keys[:] == names and keys[::-2] == names[::-2]
    assert [keys[i] for i in range(-len(names), len(names))] == names * 2
    for beyond in (len(names), -len(names) - 1):
        with pytest.raises(IndexError):
            keys[beyond]


@given(st.lists(st.none() | st.integers(0, 9) | st.integers(-1, 2**40)), st.booleans())
def test_lengths_are_a_sequence(values, whole):
    values = values if whole else [None if value is None else value / 16000 for value in values]
    lengths = Lengths.of(values, whole=whole)
    assert list(lengths) == values == lengths and [lengths[i] for i in range(len(values))] == values
    assert lengths[1:3] == values[1:3] and len(lengths) == len(values)
    if lengths.present:
        assert (
            list(Lengths.unpacked(lengths.packed(), "text_frames" if whole else "audio_seconds", len(values))) == values
        )
    assert filled(lengths).tolist() == filled(values).tolist() == [value or 0 for value in values]
