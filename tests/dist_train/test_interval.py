"""Do 95 % intervals hold the truth in about 95 of 100 cases, although steps hang on each other?"""

from __future__ import annotations

import math

import numpy as np
import pytest

from dist_train.interval import Estimate, ratio, student

TRIES = 400
# Two-sided 95 % quantiles of Student's t, as printed in every table.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 9: 2.262, 19: 2.093, 29: 2.045, 120: 1.980}


def sticky(rng: np.random.Generator, count: int, correlation: float) -> np.ndarray:
    """[count] of a stationary autoregressive process of variance 1."""
    noise = rng.normal(size=count) * math.sqrt(1 - correlation**2)
    values = np.empty(count)
    values[0] = rng.normal()
    for place in range(1, count):
        values[place] = correlation * values[place - 1] + noise[place]
    return values


def run(
    rng: np.random.Generator, count: int, correlation: float, *, pace: float = 1.0, differs: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Clips and seconds of steps that take log-normal times around clips / 10 / pace; runs differ by `differs`."""
    clips = rng.integers(20, 30, count).astype(float)
    slowness = np.exp(0.2 * sticky(rng, count, correlation) - 0.02 + differs * rng.normal())
    return clips, clips / 10 / pace * slowness


def holds(estimate: Estimate, truth: float) -> bool:
    assert estimate.bounds is not None
    low, high = estimate.bounds
    return low <= truth <= high


def share(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.8])
def test_one_run_of_correlated_steps(correlation: float) -> None:
    rng = np.random.default_rng()
    found = [ratio([run(rng, 150, correlation)]) for _ in range(TRIES)]
    covered = share([holds(one, 10) for one in found])
    assert 0.88 <= covered <= 0.995
    if correlation == 0.8:  # what would be claimed if steps were taken for independent
        naive = [holds(Estimate(one.value, 0.2 / math.sqrt(150), 149), 10) for one in found]
        assert share(naive) < 0.7


def test_the_quotient_of_two_worlds() -> None:
    rng = np.random.default_rng()
    hits = []
    for _ in range(TRIES):
        slow, fast = ratio([run(rng, 120, 0.6)]), ratio([run(rng, 60, 0.6, pace=1.7)])
        hits.append(holds(fast.over(slow).times(0.5), 0.85))
    assert 0.90 <= share(hits) <= 0.995


def test_what_differs_between_runs_is_in_the_interval_of_three() -> None:
    rng = np.random.default_rng()

    def once(count: int) -> Estimate:
        return ratio([run(rng, 60, 0.5, differs=0.1) for _ in range(count)])

    truth = 10
    assert 0.90 <= share([holds(once(3), truth) for _ in range(TRIES)]) <= 0.995
    assert share([holds(once(1), truth) for _ in range(TRIES)]) < 0.85  # one run cannot see it


def test_sums_are_divided_and_short_runs_have_no_interval() -> None:
    rng = np.random.default_rng()
    runs = [run(rng, int(count), 0.3) for count in rng.integers(3, 40, 4)]
    found = ratio(runs)
    assert found.value == pytest.approx(sum(a.sum() for a, _ in runs) / sum(b.sum() for _, b in runs))
    assert found.bounds is not None and found.bounds[0] < found.value < found.bounds[1]
    few = ratio([run(rng, 5, 0.0)])
    assert few.value > 0 and few.bounds is None and few.over(found).bounds is None


def test_quantiles_of_students_t() -> None:
    for freedom, quantile in TABLE.items():
        assert student(freedom) == pytest.approx(quantile, rel=1.5e-3)
    assert student(2.9) == student(2) and student(0.5) == student(1)


def test_steps_without_spread() -> None:
    same = ratio([(np.full(50, 8.0), np.full(50, 2.0))])
    assert same.value == 4 and same.bounds == (4, 4) and same.over(same).bounds == (1, 1)
