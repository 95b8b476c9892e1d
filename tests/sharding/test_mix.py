"""Several datasets as one: the samples of each under its name, and what does not fit told at once."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from sharding.errors import UserError, UserErrors
from sharding.mix import MixedSplit, Part
from sharding.shard_writer import pack_sample, write_dataset
from sharding.shards import Dims, load_info
from sharding.shuffle import Source
from sharding.stream import ShardedSplit
from tests.corpus import LABELS, random_sample, write_corpus

CONTENT = ("label", "audio", "text", "text_features", "simulated", "vision")


@pytest.fixture
def parts(tmp_path):
    """Three datasets whose keys clash; the second has a validation split only."""
    rng = np.random.default_rng()
    for name, size, split in (("b", 9, "train"), ("c", 4, "valid"), ("a-b", 6, "train")):
        samples = [random_sample(rng, f"k{number}") for number in rng.choice(12, size, replace=False)]
        write_corpus(tmp_path / name, samples, 3, split)
    return [Part(name, tmp_path / name, weight) for name, weight in (("b", 2.0), ("c", 1.0), ("a-b", 0.5))]


def same(a, b):
    return all(np.array_equal(a[name], b[name]) if a[name] is not None else b[name] is None for name in CONTENT)


def test_samples_are_those_of_the_parts_under_their_names(parts):
    split = MixedSplit(parts, "train")
    alone = {name: ShardedSplit(root, "train") for name, root, _ in parts if name != "c"}
    assert len(split) == 15 and split.sources == (Source(6, 0.5, "a-b"), Source(9, 2.0, "b"))
    expected = [(name, i) for name in ("a-b", "b") for i in range(len(alone[name]))]
    for index, (name, i) in enumerate(expected):
        found, sample = split[index], alone[name][i]
        assert found["key"] == split.keys[index] == f"{name}/{sample['key']}" and found["index"] == index
        assert same(found, sample) and split.labels[index] == sample["label"]
        assert split.columns.vision_frames[index] == alone[name].columns.vision_frames[i]
    assert pickle.loads(pickle.dumps(split))[12]["key"] == split.keys[12]
    assert len(MixedSplit(parts, "valid")) == 4 and MixedSplit(parts, "valid").keys[0].startswith("c/")
    assert split.info.splits == {"train": 15, "valid": 4}


def test_the_hash_is_a_function_of_parts_and_weights(parts, tmp_path):
    whole = MixedSplit(parts, "train").info.content_hash
    assert MixedSplit(parts[::-1], "train").info.content_hash == whole
    assert MixedSplit(parts[::-1], "train").keys == MixedSplit(parts, "train").keys
    for changed in (parts[:2], [*parts[:2], parts[2]._replace(weight=0.6)], [*parts[:2], parts[2]._replace(name="z")]):
        assert MixedSplit(changed, "train").info.content_hash != whole
    rng = np.random.default_rng()
    write_corpus(tmp_path / "other", [random_sample(rng, f"k{number}") for number in range(6)], 3)
    other = [*parts[:2], parts[2]._replace(root=tmp_path / "other")]
    assert MixedSplit(other, "train").info.content_hash != whole


def test_a_damaged_sample_is_named_with_its_tar(parts):
    split = MixedSplit(parts, "train")
    index = 7
    tar = Path(split.columns.tars[split.columns.tar[index]])
    data = bytearray(tar.read_bytes())
    data[split.columns.offset[index] + 600] ^= 255
    tar.write_bytes(data)
    with pytest.raises(UserError, match="checksum") as caught:
        split[index]
    assert str(tar) in str(caught.value) and split.keys[index].split("/")[1] in str(caught.value)
    assert "set_aside" in MixedSplit(parts, "train", "set_aside")[index]


def test_what_is_wrong_with_all_parts_is_told_at_once(parts, tmp_path):
    (tmp_path / "b" / "train-000000.tar").unlink()
    (tmp_path / "a-b" / "train-000001.tar.index.json").unlink()
    with pytest.raises(UserErrors) as caught:
        MixedSplit(parts, "train")
    assert [error.where.split("/")[-1] for error in caught.value.errors] == [
        "train-000001.tar.index.json",
        "train-000000.tar",
    ]
    with pytest.raises(UserError, match="is not a shard directory"):
        MixedSplit([*parts, Part("gone", tmp_path / "gone", 1.0)], "train")


def test_parts_that_do_not_fit(parts, tmp_path):
    def write(name, dims, label_range, **arrays):
        with write_dataset(tmp_path / name, dims=dims, label_range=label_range, samples_per_shard=4) as writer:
            writer.add("train", pack_sample("k", 0.0, "train", **arrays))
        return Part(name, tmp_path / name, 1.0)

    wide = write("wide", Dims(vision=6), LABELS, vision=np.zeros((2, 6), np.float32))
    features = write("features", Dims(audio=8), (0.0, 1.0), audio=np.zeros((2, 8), np.float32))
    bare = write("bare", Dims(), LABELS, text="nothing but text")
    with pytest.raises(UserErrors) as caught:
        MixedSplit([*parts, wide, features, bare], "train")
    lines = sorted(str(error) for error in caught.value.errors)
    assert len(lines) == 3
    assert "features: has audio of width 8" in lines[0] or "has audio of width waveform" in lines[0]
    assert any("has labels in 0 … 1" in line for line in lines)
    assert any("wide: has vision of width 6" in line for line in lines)
    assert MixedSplit([*parts, bare], "train").info.dims == load_info(tmp_path / "b").dims


def test_no_part_has_the_split(parts):
    with pytest.raises(UserError, match=r"have no split 'test'\. Use train or valid"):
        MixedSplit(parts, "test")


def test_a_weight_that_gives_nothing(parts):
    with pytest.raises(UserError, match="a-b would contribute"):
        MixedSplit([parts[0], parts[2]._replace(weight=1e-3)], "train")
