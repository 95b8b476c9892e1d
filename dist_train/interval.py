"""95 % confidence intervals of ratios of sums over training steps, such as clips per second.

Steps that follow each other resemble each other (loading, other work on the machine, the clock of a hot processor), so
they are no independent draws. The steps of a run are cut into equal blocks; the means of long blocks hardly hang on
each other, and their spread tells how far the whole mean may be off (batch means; Law & Kelton, Simulation Modeling
and Analysis, 9.5.3). Where neighbouring blocks still go together, the interval is widened by what an autoregressive
process of that correlation would need. From three runs on, each run counts as one draw: then what differs between runs
(placement, seed, time of day) is in the interval, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
BLOCKS = 10  # of a run
SHORTEST = 3  # steps of a block
RUNS = 3  # from so many on, runs are the draws
STICKIEST = 0.9  # correlation of neighbouring blocks that is still believed


class Estimate(NamedTuple):
    """A positive number and how well it is known.

    Args:
        value: the estimate.
        error: standard error, relative to the value; None if there are too few steps to tell.
        freedom: degrees of freedom of the error.
    """

    value: float
    error: float | None
    freedom: float

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The 95 % interval, symmetric in the logarithm."""
        if self.error is None:
            return None
        reach = min(student(self.freedom) * self.error, 50.0)  # beyond: nothing is known
        return self.value * math.exp(-reach), self.value * math.exp(reach)

    def over(self, other: Estimate) -> Estimate:
        """The quotient of two independent estimates, its degrees of freedom by Welch and Satterthwaite."""
        value = self.value / other.value
        if self.error is None or other.error is None:
            return Estimate(value, None, 0)
        own, others = self.error**2, other.error**2
        if own + others == 0:
            return Estimate(value, 0.0, min(self.freedom, other.freedom))
        freedom = (own + others) ** 2 / (own**2 / self.freedom + others**2 / other.freedom)
        return Estimate(value, math.sqrt(own + others), freedom)

    def times(self, factor: float) -> Estimate:
        """In another unit."""
        return self._replace(value=self.value * factor)


def ratio(runs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Estimate:
    """Sum over sum, over all steps of all runs.

    Args:
        runs: of each, numerator and denominator of its steps [n]; the sums of both must be positive.
    """
    above, below = (np.concatenate([run[k] for run in runs]) for k in (0, 1))
    value = float(above.sum() / below.sum())
    # To first order the relative error of the ratio is the mean of these.
    parts = [one / above.mean() - other / below.mean() for one, other in runs]
    if len(runs) >= RUNS:
        means = np.array([part.mean() for part in parts])
        return Estimate(value, float(means.std(ddof=1) / math.sqrt(len(means))), len(means) - 1)
    blocked = [blocks(part) for part in parts if len(part) >= SHORTEST * 2]
    means = np.concatenate(blocked) if blocked else np.empty(0)
    if len(means) < 3:
        return Estimate(value, None, 0)
    variance = means.var(ddof=1) * stickiness(blocked) / len(means)
    return Estimate(value, math.sqrt(variance), len(means) - 1)


def blocks(steps: np.ndarray) -> np.ndarray:
    """Means of consecutive blocks of about equal length; [n] -> [at most BLOCKS]."""
    count = min(BLOCKS, len(steps) // SHORTEST)
    return np.array([part.mean() for part in np.array_split(steps, count)])


def stickiness(runs: Sequence[np.ndarray]) -> float:
    """How much the variance of a mean of these blocks exceeds that of as many independent ones, by the correlation of
    neighbours.
    """
    centre = np.concatenate(runs).mean()
    pairs = sum(float(((run[1:] - centre) * (run[:-1] - centre)).sum()) for run in runs)
    squares = sum(float(((run - centre) ** 2).sum()) for run in runs)
    if squares == 0:
        return 1.0
    count = sum(map(len, runs))
    correlation = min(max(pairs / squares + 1 / count, 0.0), STICKIEST)  # the estimate is too low by about 1 / count
    return (1 + correlation) / (1 - correlation)


def student(freedom: float) -> float:
    """Two-sided 95 % quantile of Student's t: closed forms for 1 and 2 degrees of freedom, else the expansion of
    Abramowitz & Stegun, 26.7.5 (off by 0.1 % at 3). Fractions count down.
    """
    probability = (1 + LEVEL) / 2
    whole = math.floor(freedom + 1e-9)
    if whole <= 1:
        return math.tan(math.pi * (probability - 0.5))
    if whole == 2:
        return LEVEL * math.sqrt(2 / (1 - LEVEL**2))
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / whole ** (power + 1) for power, term in enumerate(terms))
