"""Reading ahead: every byte of a window once, from front to back, before its rows are handed out; never an error."""

import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sharding import readahead
from sharding.errors import UserError
from sharding.order import EpochPlan
from sharding.readahead import Readahead, byte_ranges
from sharding.shuffle import Window
from sharding.stream import ShardedSplit, rows_behind, stream
from tests.corpus import random_sample, write_corpus
from tests.sharding.test_stream import rows_of


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    rng = np.random.default_rng()
    out = tmp_path_factory.mktemp("readahead") / "out"
    write_corpus(out, [random_sample(rng, f"k{number:03d}") for number in range(60)], 17)
    return ShardedSplit(out, "train")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chosen=st.sets(st.integers(0, 59), min_size=1), gap=st.integers(0, 30_000))
def test_ranges_hold_the_samples_and_no_more_than_gaps(split, chosen, gap):
    table, before = split.columns, readahead.GAP
    readahead.GAP = gap
    try:
        found = list(byte_ranges(table, np.array(list(chosen))))
    finally:
        readahead.GAP = before
    assert [path for path, _ in found] == sorted({table.tars[table.tar[i]] for i in chosen})
    for path, ranges in found:
        here = [i for i in chosen if table.tars[table.tar[i]] == path]
        wanted = sorted((int(table.offset[i]), int(table.offset[i] + table.size[i])) for i in here)
        joined = [wanted[0]]
        for start, end in wanted[1:]:
            if start - joined[-1][1] <= gap:
                joined[-1] = joined[-1][0], end
            else:
                joined.append((start, end))
        assert ranges == joined


def test_a_window_of_one_rank_is_whole_blocks(split):
    plan = EpochPlan(60, 6, 1, 1, 5, 2, window=Window(12, 6))
    for start in range(0, 60, 12):
        ranges = [part for _, parts in byte_ranges(split.columns, plan.order[start : start + 12]) for part in parts]
        assert len(ranges) <= 2 + 2  # two blocks; a block may lie on both sides of a tar's end


@pytest.mark.parametrize("start", [0, 1, 4, 9])
def test_rows_wait_for_their_window_and_the_next_one_is_asked_for(split, start):
    plan = EpochPlan(60, 6, 1, 2, 5, 2, window=Window(15, 5))
    asked, done = [], []

    class Watched(Readahead):
        def start(self, samples):
            asked.append(set(samples.tolist()))
            return super().start(samples)

        def _read(self, samples):
            super()._read(samples)
            done.append(set(samples.tolist()))

    ahead = Watched(split.columns)
    for rows in rows_behind(ahead, plan, 1, start):
        own = {index for index, _ in rows}
        here = next(number for number, samples in enumerate(asked) if own <= samples)
        assert own <= set().union(*done)
        assert len(asked) <= here + 2
    ahead.close()
    every = {index for step in range(start, plan.steps) for index, _ in plan.micro_batch(step, 0, 1)}
    assert set().union(*asked) == every == set().union(*done)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_windowed_stream_is_its_plan_and_leaves_no_thread(split, workers):
    plan = EpochPlan(60, 7, 2, 1, 5, 2, window=Window(15, 5))
    seen = [key for rows in stream(split, plan, 0, rows_of, workers=workers) for key, real in rows if real]
    assert seen == [split.keys[index] for index in plan.order]
    early = stream(split, plan, 0, rows_of, start_step=2, workers=workers)
    assert [key for key, real in next(early) if real] == [split.keys[i] for i in plan.batch(2)][:4]
    early.close()
    deadline = time.monotonic() + 20
    while any(thread.name.startswith("readahead") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_tars_that_vanish_or_shrink_are_told_by_their_samples(tmp_path):
    rng = np.random.default_rng()
    write_corpus(tmp_path / "out", [random_sample(rng, f"k{number}") for number in range(20)], 7)
    split = ShardedSplit(tmp_path / "out", "train")
    (tmp_path / "out" / "train-000001.tar").unlink()
    (tmp_path / "out" / "train-000002.tar").write_bytes(b"")
    plan = EpochPlan(20, 20, 1, 1, 0, 0, window=Window(8, 4))
    with pytest.raises(Exception, match=r"train-00000[12]\.tar") as caught:
        next(stream(split, plan, 0, rows_of))
    assert all(isinstance(error, UserError) for error in getattr(caught.value, "errors", [caught.value]))
