"""Orders of an epoch: global, windowed and mixed, each a pure function of (seed, epoch).

None knows of tars: positions are those of the key-sorted split, so equal content has the same order in any layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

_SAMPLES, _BLOCKS, _INSIDE, _TURNS = range(4)  # independent streams of random bits, by what they order


@dataclass(frozen=True)
class Window:
    """How far a windowed order mixes.

    Args:
        samples: permuted together, >= block; whole blocks of them are.
        block: samples that follow each other in key order and enter the same window, >= 1.

    Raises:
        ValueError: a size is too small.
    """

    samples: int
    block: int

    def __post_init__(self) -> None:
        if not 1 <= self.block <= self.samples:
            raise ValueError(f"a window of {self.samples} samples cannot hold blocks of {self.block}")


@dataclass(frozen=True)
class Source:
    """One of the datasets of a mix.

    Args:
        samples: in its split, >= 1.
        weight: its part of an epoch, relative to those of the others, > 0.
        name: for messages.
    """

    samples: int
    weight: float = 1.0
    name: str = ""


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which epoch `epoch` visits the samples 0 … n-1 (positions in the key-sorted split).

    Sorts the raw 64-bit stream of Philox4x64 keyed by (seed, epoch). NumPy guarantees raw bit streams across versions,
    which it does not for `Generator.permutation` (NEP 19), so an old run can be continued under a new NumPy.

    Args:
        n: number of samples.
        seed: 0 … 2^64-1.
        epoch: 0 … 2^64-1.

    Returns:
        int64 [n], each index once.

    Raises:
        ValueError: n, seed or epoch is negative or beyond 64 bits.
    """
    return _ranked(_bits(n, seed, epoch))


def windowed(n: int, seed: int, epoch: int, window: Window, source: int = 0) -> np.ndarray:
    """An order that reads neighbours together: blocks of the key-sorted split are permuted, as many of them as make a
    window follow each other, and the samples of a window are permuted.

    A window so holds samples from all over the split, and still takes only a few ranges of bytes where the tars are in
    key order, as `dist-train shards make` writes them (see `sharding.readahead`). Blocks of key order rather than tars
    make it independent of the layout: the same content gives the same order in tars of any size.

    Args:
        n, seed, epoch: see `permutation`.
        window: sizes.
        source: number of the dataset in a mix; each has an order of its own.

    Returns:
        int64 [n], each index once.

    Raises:
        ValueError: see `permutation`.
    """
    blocks = _ranked(_bits(-(-n // window.block), seed, epoch, source, _BLOCKS))
    order = (blocks[:, None] * window.block + np.arange(window.block)).ravel()
    number = np.repeat(np.arange(len(blocks)) // (window.samples // window.block), window.block)
    here = order < n  # the last block may be short
    order, number = order[here], number[here]
    return order[np.lexsort((_bits(n, seed, epoch, source, _INSIDE), number))].astype(np.int64)


def epoch_order(sources: Sequence[Source], seed: int, epoch: int, window: Window | None = None) -> np.ndarray:
    """The order of an epoch over one dataset, or several mixed by weight.

    An epoch has as many samples as all sources together, and source i contributes `shares(sources)[i]` of them in every
    epoch, at random places. It hands out its samples pass by pass, each pass in an order of its own, and goes on in
    the next epoch where it stopped: whatever the weights, after any number of epochs no sample of a source has been
    visited more than once more often than another. With one source, a pass is an epoch.

    Args:
        sources: at least one; positions count through them, the first source's samples first.
        seed, epoch: see `permutation`.
        window: samples that are permuted together (see `windowed`), in each source by itself; None permutes globally.

    Returns:
        int64 [n], n = samples of all sources. Of several sources, some samples may be absent and others there twice.

    Raises:
        ValueError: see `permutation` and `shares`.
    """
    counts = shares(sources)
    parts, first = [], 0
    for number, (source, count) in enumerate(zip(sources, counts, strict=True)):
        parts.append(first + _visits(source.samples, count * epoch, count, seed, number, window))
        first += source.samples
    if len(parts) == 1:
        return parts[0]
    turns = np.repeat(np.arange(len(counts)), counts)
    turns = turns[_ranked(_bits(first, seed, epoch, 0, _TURNS))]
    order = np.empty(first, np.int64)
    for number, part in enumerate(parts):
        order[turns == number] = part
    return order


def shares(sources: Sequence[Source]) -> list[int]:
    """Samples of an epoch that each source contributes: in proportion to the weights, rounded by largest remainder.

    Raises:
        ValueError: a source would contribute less than one.
    """
    total = sum(source.samples for source in sources)
    weights = [Fraction(source.weight) for source in sources]  # exact: all machines round alike
    quotas = [total * weight / sum(weights) for weight in weights]
    for number, quota in enumerate(quotas):
        if quota < 1:
            name = sources[number].name or f"source {number}"
            raise ValueError(f"{name} would contribute {float(quota):.2g} samples to an epoch of {total}")
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda number: (counts[number] - quotas[number], number))
    for number in by_remainder[: total - sum(counts)]:
        counts[number] += 1
    return counts


def _visits(n: int, start: int, count: int, seed: int, number: int, window: Window | None) -> np.ndarray:
    """Samples start … start + count - 1 of a source's endless row of passes."""
    passes = range(start // n, -(-(start + count) // n))
    if window is not None:
        row = [windowed(n, seed, one, window, number) for one in passes]
    else:
        row = [_ranked(_bits(n, seed, one, number)) for one in passes]
    skipped = start - passes.start * n
    return np.concatenate(row)[skipped : skipped + count]


def _bits(n: int, seed: int, epoch: int, source: int = 0, purpose: int = _SAMPLES) -> np.ndarray:
    """uint64 [n]: Philox4x64 keyed by (seed, epoch); source and purpose take the counter's upper words."""
    if n < 0 or not 0 <= seed < 2**64 or not 0 <= epoch < 2**64:
        raise ValueError(f"n, seed and epoch must lie in 0 … 2^64-1, got {n}, {seed}, {epoch}")
    key = np.array([seed, epoch], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, purpose, source], dtype=np.uint64)).random_raw(n)


def _ranked(bits: np.ndarray) -> np.ndarray:
    """int64 [n]: np.argsort(bits, kind="stable"), in half the time by sorting the upper bits with the index below."""
    n = len(bits)
    low = np.uint64(2 ** max(n - 1, 0).bit_length() - 1)
    order = (np.sort(bits & ~low | np.arange(n, dtype=np.uint64)) & low).astype(np.int64)
    ranked = bits[order]
    if (ranked[1:] > ranked[:-1]).all():
        return order
    return np.argsort(bits, kind="stable").astype(np.int64)  # equal upper bits: rare below ten million samples
