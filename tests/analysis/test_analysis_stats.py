from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from analysis import stats


def test_mean_and_spread_by_hand() -> None:
    # Deviations -2, 0, 2: squares sum to 8, over n - 1 = 2 gives a variance of 4.
    assert stats.sample([3.0, 5.0, 7.0]) == stats.Sample(3, 5.0, 2.0)


def test_one_seed_has_no_spread_and_none_has_no_mean() -> None:
    one, none = stats.sample([4.0]), stats.sample([])
    assert (one.n, one.mean) == (1, 4.0)
    assert math.isnan(one.std)
    assert none.n == 0
    assert math.isnan(none.mean)


@pytest.mark.parametrize(("n", "m", "confidence"), [(2, 2, 0.95), (3, 3, 0.95), (3, 9, 0.9), (5, 2, 0.995)])
def test_welch_equals_scipy(n: int, m: int, confidence: float) -> None:
    draws = np.random.default_rng(n * 100 + m)
    a, b = draws.normal(10, 1, n), draws.normal(12, 3, m)
    ours = stats.welch(a, b, confidence)
    theirs = scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval(confidence)
    assert ours.estimate == pytest.approx(a.mean() - b.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


def test_welch_by_hand() -> None:
    # Both sides: variance 1, n = 3: standard error sqrt(2/3), 4 degrees of freedom, t(.975, 4) = 2.7764.
    gap = stats.welch([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    assert gap.estimate == -3
    assert gap.high == pytest.approx(-3 + 2.776445 * math.sqrt(2 / 3), abs=1e-5)
    assert gap.verdict == "lower"


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ([1.0, 2.0, 3.0], [1.5, 2.5, 3.5], stats.NO_DIFFERENCE),
        ([9.0, 9.1, 9.2], [1.0, 1.1, 1.2], "higher"),
        ([1.0], [5.0, 6.0], stats.NOT_JUDGED),
        ([1.0, 2.0], [5.0], stats.NOT_JUDGED),
        ([3.0, 3.0], [3.0, 3.0], stats.NO_DIFFERENCE),
        ([3.0, 3.0], [4.0, 4.0], "lower"),
    ],
)
def test_verdict(a: list[float], b: list[float], verdict: str) -> None:
    assert stats.welch(a, b).verdict == verdict


def test_more_comparisons_widen_the_interval() -> None:
    assert stats.simultaneous(0.95, 5) == pytest.approx(0.99)
    assert stats.simultaneous(0.95, 0) == 0.95


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
def test_confidence_outside_its_range_is_refused(confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence must be in"):
        stats.welch([1, 2], [3, 4], confidence)


def test_pareto_front_by_hand() -> None:
    costs = [1.0, 2.0, 2.0, 3.0, 4.0]
    values = [9.0, 5.0, 4.0, 4.0, 1.0]  # (2, 5) is beaten by (2, 4); (3, 4) is no better than (2, 4) and costs more
    assert stats.pareto(costs, values) == [0, 2, 4]


def test_nothing_dominates_the_front() -> None:
    points = np.random.default_rng(0).random((200, 2))
    front = points[stats.pareto(points[:, 0].tolist(), points[:, 1].tolist())]
    beaten = (points[None] <= front[:, None]).all(-1) & (points[None] < front[:, None]).any(-1)
    assert not beaten.any()
    for point in points:
        assert (front <= point).all(-1).any()
