"""Orders against plain Python on the published random stream; every sample is visited as often as its share says."""

from collections import Counter
from fractions import Fraction
from itertools import count, islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.shuffle import Source, Window, _ranked, epoch_order, permutation, shares, windowed

seeds, epochs = st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)
windows = st.builds(lambda block, blocks, more: Window(block * blocks + more % block, block),
                    st.integers(1, 9), st.integers(1, 5), st.integers(0, 8))  # fmt: skip
weights = st.floats(0.2, 5) | st.integers(1, 5).map(float)


def contributes(sources: list[Source]) -> bool:
    """Whether each source gives at least one sample to an epoch; a mix in which one does not is refused."""
    total, weight = sum(source.samples for source in sources), sum(source.weight for source in sources)
    return all(total * source.weight >= weight for source in sources)


mixes = st.lists(st.builds(Source, st.integers(8, 40), weights), min_size=1, max_size=4).filter(contributes)


def philox4x64(key: tuple[int, int], n: int, purpose: int = 0, source: int = 0) -> list[int]:
    """Philox4x64-10 as published (Salmon et al., SC 2011), with plain integers; the counter starts at 1 as in NumPy."""
    mask, words = 2**64 - 1, []
    for block in range(1, -(-n // 4) + 1):
        c, k = [block, 0, purpose, source], list(key)
        for _ in range(10):
            left, right = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
            c = [(right >> 64) ^ c[1] ^ k[0], right & mask, (left >> 64) ^ c[3] ^ k[1], left & mask]
            k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
        words += c
    return words[:n]


def ranked(words: list[int]) -> list[int]:
    return sorted(range(len(words)), key=words.__getitem__)


def by_windows(n: int, seed: int, epoch: int, window: Window, source: int = 0) -> list[int]:
    """Blocks in random order, some of them together in random order."""
    order = ranked(philox4x64((seed, epoch), -(-n // window.block), 1, source))
    blocks = [range(i * window.block, min((i + 1) * window.block, n)) for i in order]
    together = window.samples // window.block
    draws = iter(philox4x64((seed, epoch), n, 2, source))
    found = []
    for start in range(0, len(blocks), together):
        samples = [index for block in blocks[start : start + together] for index in block]
        found += [samples[i] for i in ranked(list(islice(draws, len(samples))))]
    return found


def mixed(sources: list[Source], seed: int, epoch: int, window: Window | None) -> list[int]:
    """Every epoch from the first on, each source handing out pass after pass."""
    counts, first, turns = shares(sources), 0, []
    rows = []
    for number, source in enumerate(sources):

        def endless(number: int = number, source: Source = source, first: int = first):
            for one in count():
                words = philox4x64((seed, one), source.samples, 0, number)
                row = ranked(words) if window is None else by_windows(source.samples, seed, one, window, number)
                yield from (first + index for index in row)

        rows.append(endless())
        turns += [number] * counts[number]
        first += source.samples
    order: list[int] = []
    for one in range(epoch + 1):
        order = [next(rows[turns[i]]) for i in ranked(philox4x64((seed, one), first, 3))]
    return order


@given(n=st.integers(0, 50), seed=seeds, epoch=epochs)
def test_permutation_sorts_the_published_philox_stream(n, seed, epoch):
    assert permutation(n, seed, epoch).tolist() == ranked(philox4x64((seed, epoch), n))


def test_permutation_changes_with_seed_and_epoch():
    orders = {tuple(permutation(100, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@pytest.mark.parametrize("bad", [(-1, 0, 0), (3, -1, 0), (3, 0, 2**64)])
def test_permutation_refuses(bad):
    with pytest.raises(ValueError, match="must lie in"):
        permutation(*bad)


@given(st.lists(st.integers(0, 3) | st.integers(0, 2**64 - 1) | st.integers(2**63, 2**63 + 9), max_size=40))
def test_ranking_is_the_stable_one(bits):
    assert _ranked(np.array(bits, np.uint64)).tolist() == ranked(bits)


@given(n=st.integers(1, 90), seed=seeds, epoch=epochs, window=windows)
def test_windowed_order(n, seed, epoch, window):
    found = windowed(n, seed, epoch, window).tolist()
    assert found == by_windows(n, seed, epoch, window)
    assert sorted(found) == list(range(n))
    assert found == epoch_order([Source(n)], seed, epoch, window).tolist()


def test_a_window_of_everything_is_a_permutation_and_windows_change():
    assert sorted(windowed(50, 1, 2, Window(64, 1)).tolist()) == list(range(50))
    orders = {tuple(windowed(60, seed, epoch, Window(12, 4))) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


@pytest.mark.parametrize("sizes", [(3, 4), (0, 0), (5, 0)])
def test_windows_that_hold_no_block(sizes):
    with pytest.raises(ValueError, match="cannot hold"):
        Window(*sizes)


@given(sources=mixes, seed=seeds, epoch=st.integers(0, 5), window=st.none() | windows)
def test_mixed_order(sources, seed, epoch, window):
    assert epoch_order(sources, seed, epoch, window).tolist() == mixed(sources, seed, epoch, window)


@given(n=st.integers(1, 50), seed=seeds, epoch=st.integers(0, 9))
def test_a_mix_of_one_is_that_dataset(n, seed, epoch):
    assert epoch_order([Source(n, 0.3)], seed, epoch).tolist() == permutation(n, seed, epoch).tolist()


@given(sources=mixes, seed=seeds, last=st.integers(0, 7), window=st.none() | windows)
def test_shares_are_kept_and_all_samples_of_a_source_come_equally_often(sources, seed, last, window):
    total, weight = sum(source.samples for source in sources), sum(Fraction(source.weight) for source in sources)
    edges = np.cumsum([0, *(source.samples for source in sources)])
    visits: Counter[int] = Counter()
    for epoch in range(last + 1):
        order = epoch_order(sources, seed, epoch, window)
        visits.update(order.tolist())
        drawn = np.histogram(order, edges)[0].tolist()
        assert drawn == shares(sources) and sum(drawn) == total
    for source, drawn, start, end in zip(sources, shares(sources), edges[:-1], edges[1:], strict=True):
        assert abs(drawn - total * Fraction(source.weight) / weight) < 1
        times = [visits[index] for index in range(start, end)]
        assert max(times) - min(times) <= 1 and sum(times) == drawn * (last + 1)


def test_a_weight_too_small_for_one_sample():
    with pytest.raises(ValueError, match=r"source 1 would contribute 0\.2 samples to an epoch of 20"):
        shares([Source(10, 0.99), Source(10, 0.01)])
