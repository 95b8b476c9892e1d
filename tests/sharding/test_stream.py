"""The stream of a split: each sample once, in one order, over any ranks, workers and shards; bad samples by policy."""

import os
import pickle
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sharding.errors import UserError
from sharding.order import EpochPlan
from sharding.shuffle import permutation
from sharding.stream import ShardedSplit, stream
from tests.corpus import random_sample, write_corpus


def rows_of(samples):
    return [(sample["key"], sample["real"]) for sample in samples]


def refuse(samples):
    raise UserError(samples[0]["key"], "does not collate", "Try another")


def signals_of(samples):
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR2)], os.getpid()


@pytest.fixture
def samples():
    rng = np.random.default_rng()
    return [random_sample(rng, f"k{number}") for number in rng.choice(1000, 23, replace=False)]


@pytest.fixture
def root(tmp_path, samples):
    write_corpus(tmp_path / "out", samples, 5)
    return tmp_path / "out"


def damage(root: Path, key: str) -> None:
    split = ShardedSplit(root, "train")
    i = split.keys.index(key)
    path = next(p for p in root.glob("*.tar") if f'"{key}"' in (root / f"{p.name}.index.json").read_text())
    data = bytearray(path.read_bytes())
    data[split.columns.offset[i] + split.columns.size[i] // 2] ^= 255
    path.write_bytes(data)


def test_samples_are_what_was_written_in_key_order(root, samples):
    split = ShardedSplit(root, "train")
    expected = sorted(samples, key=lambda sample: sample["key"])
    assert split.keys == [sample["key"] for sample in expected]
    assert split.labels.tolist() == [sample["label"] for sample in expected]
    assert (split.dims.audio, split.dims.vision, len(split)) == ("waveform", 5, len(samples))
    for i, sample in enumerate(expected):
        found = split[i]
        assert set(found) == {"key", "index", "label", "audio", "text", "text_features", "simulated", "vision"}
        assert (found["key"], found["index"], found["label"]) == (sample["key"], i, sample["label"])
        for name in ("audio", "text", "text_features", "simulated", "vision"):
            assert np.array_equal(found[name], sample[name]) if sample[name] is not None else found[name] is None
    for beyond in (-1, len(samples)):
        with pytest.raises(IndexError):
            split[beyond]


def test_picklable_with_open_files(root):
    split = ShardedSplit(root, "train")
    split[0]
    copy = pickle.loads(pickle.dumps(split))
    assert copy[3]["key"] == split[3]["key"]


def test_more_tars_than_open_files(tmp_path, samples, monkeypatch):
    write_corpus(tmp_path / "many", samples, 1)
    monkeypatch.setattr("sharding.stream._MAX_OPEN", 3)
    split = ShardedSplit(tmp_path / "many", "train")
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert [split[i]["key"] for i in range(len(split))] == split.keys
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 3
    del split
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    n=st.integers(1, 30),
    per_shard=st.integers(1, 31),
    world=st.integers(1, 5),
    workers=st.sampled_from([0, 0, 0, 0, 1, 2]),
    accumulation=st.integers(1, 3),
    global_batch=st.integers(1, 16),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 9),
)
def test_each_sample_once_in_one_order(*, n, per_shard, world, workers, accumulation, global_batch, seed, epoch):
    rng = np.random.default_rng(seed)
    keys = [f"k{number}" for number in rng.choice(1000, n, replace=False)]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "out"
        write_corpus(root, [random_sample(rng, key) for key in keys], per_shard)
        split = ShardedSplit(root, "train")
        plan = EpochPlan(n, global_batch, accumulation, world, seed, epoch)
        ranks = [list(stream(split, plan, rank, rows_of, workers=workers)) for rank in range(world)]
    assert {len(rank) for rank in ranks} == {plan.steps * accumulation}
    micro_batches = list(zip(*ranks, strict=True))
    assert all(len({len(rows) for rows in ranks_rows}) == 1 for ranks_rows in micro_batches)
    seen = [key for ranks_rows in micro_batches for rows in ranks_rows for key, real in rows if real]
    # The reference knows nothing of shards, ranks or workers.
    assert seen == [sorted(keys)[i] for i in permutation(n, seed, epoch)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_later_step_is_the_rest_of_the_epoch(root, samples, workers):
    split = ShardedSplit(root, "train")
    plan = EpochPlan(len(samples), 4, 2, 2, 7, 1)
    whole = list(stream(split, plan, 1, rows_of))
    assert list(stream(split, plan, 1, rows_of, start_step=3, workers=workers)) == whole[3 * 2 :]
    assert list(stream(split, plan, 1, rows_of, start_step=plan.steps)) == []


def test_resuming_reads_nothing_of_the_steps_before(root, samples, monkeypatch):
    read: list[int] = []

    def record(split, index):
        read.append(index)
        return {}

    monkeypatch.setattr(ShardedSplit, "_read", record)
    plan = EpochPlan(len(samples), 4, 1, 1, 7, 1)
    next(stream(ShardedSplit(root, "train"), plan, 0, rows_of, start_step=4))
    assert read == plan.batch(4).tolist()


def test_the_plan_must_be_of_this_split(root, samples):
    with pytest.raises(ValueError, match="the split has"):
        next(stream(ShardedSplit(root, "train"), EpochPlan(len(samples) + 1, 4, 1, 1, 0, 0), 0, rows_of))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_sample_stops_with_one_line(root, samples, workers):
    key = samples[11]["key"]
    damage(root, key)
    plan = EpochPlan(len(samples), 4, 1, 1, 0, 0)
    with pytest.raises(UserError, match="checksum") as caught:
        list(stream(ShardedSplit(root, "train"), plan, 0, rows_of, workers=workers))
    assert key in str(caught.value) and ".tar" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_sample_is_set_aside_and_counted_once(root, samples, workers):
    key = samples[11]["key"]
    damage(root, key)
    split = ShardedSplit(root, "train", on_bad_sample="set_aside")
    plan = EpochPlan(len(samples), 1, 1, 3, 0, 0)  # each sample is repeated by two fillers
    found = [
        sample for rank in range(3) for batch in stream(split, plan, rank, list, workers=workers) for sample in batch
    ]
    aside = [sample for sample in found if "set_aside" in sample]
    assert [sample["key"] for sample in aside] == [key] and "checksum" in aside[0]["set_aside"]
    assert sorted(sample["key"] for sample in found if sample["real"]) == sorted(set(split.keys) - {key})
    for sample in found:
        if sample["key"] == key:
            assert not sample["real"] and sample["label"] == samples[11]["label"]
            assert all(sample[name] is None for name in ("audio", "text", "text_features", "simulated", "vision"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_user_error_of_collate_passes_through(root, samples, workers):
    plan = EpochPlan(len(samples), 4, 1, 1, 0, 0)
    with pytest.raises(UserError, match="does not collate"):
        list(stream(ShardedSplit(root, "train"), plan, 0, refuse, workers=workers))


def test_a_tar_that_vanishes(root, samples):
    split = ShardedSplit(root, "train")
    for path in root.glob("*.tar"):
        path.unlink()
    with pytest.raises(UserError, match="cannot be opened"):
        split[0]


def test_another_width_than_stated(root):
    path = root / "dataset.json"
    path.write_text(path.read_text().replace('"vision": 5', '"vision": 6'))
    split = ShardedSplit(root, "train")
    first = next(i for i, frames in enumerate(split.columns.vision_frames) if frames is not None)
    with pytest.raises(UserError, match="width 6"):
        split[first]


def test_workers_leave_signals_to_the_trainer(root, samples):
    plan = EpochPlan(len(samples), 8, 1, 1, 0, 0)
    for handlers, process in stream(ShardedSplit(root, "train"), plan, 0, signals_of, workers=1):
        assert handlers == [signal.SIG_IGN, signal.SIG_IGN] and process != os.getpid()
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN


def test_leaving_early_ends_the_workers(root, samples):
    batches = stream(ShardedSplit(root, "train"), EpochPlan(len(samples), 2, 1, 1, 0, 0), 0, signals_of, workers=2)
    process = next(batches)[1]
    batches.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_tensors_are_collated(root, samples):
    split = ShardedSplit(root, "train")
    plan = EpochPlan(len(samples), 4, 1, 1, 0, 0, shuffle=False)
    batches = stream(split, plan, 0, lambda rows: torch.tensor([row["label"] for row in rows]).double(), workers=1)
    assert torch.cat(list(batches)).numpy()[: len(split)] == pytest.approx(split.labels, abs=1e-6)
