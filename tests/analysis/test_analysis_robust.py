from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from analysis import robust

values = st.lists(st.floats(-1e6, 1e6).map(lambda v: round(v, 3)), min_size=2, max_size=8)


def test_the_interquartile_mean_by_hand() -> None:
    # Eight values: two of each end go, (3 + 4 + 5 + 6) / 4 is left.
    assert robust.interquartile_mean([8, 1, 2, 7, 3, 6, 4, 500]) == pytest.approx((3 + 4 + 6 + 7) / 4)
    assert robust.interquartile_mean([1.0, 2.0, 6.0]) == 3.0  # nothing to leave out below four
    assert math.isnan(robust.interquartile_mean([]))


@pytest.mark.parametrize("n", [3, 4, 7, 8, 21])
def test_the_interquartile_mean_equals_scipys_trimmed_mean(n: int) -> None:
    sample = np.random.default_rng(n).normal(size=n)
    assert robust.interquartile_mean(sample.tolist()) == pytest.approx(scipy.stats.trim_mean(sample, 0.25))


def test_the_bootstrap_of_the_interquartile_mean() -> None:
    found = robust.interquartile_mean_interval([[1.0, 2.0, 3.0], [11.0, 12.0, 13.0]], 0.95)
    assert found == robust.interquartile_mean_interval([[1.0, 2.0, 3.0], [11.0, 12.0, 13.0]], 0.95)  # seeded
    assert found.estimate == pytest.approx((2 + 3 + 11 + 12) / 4)
    # Groups are resampled on their own: three low and three high values stay, so that the ends lie between.
    assert 4 < found.low < found.estimate < found.high < 10
    assert math.isnan(robust.interquartile_mean_interval([[1.0], [2.0]], 0.95).low)


def test_the_profile_by_hand() -> None:
    share, low, high = robust.performance_profile([[1.0, 2.0], [3.0, 4.0]], [0.5, 1.0, 2.5, 4.0], 0.95)
    assert share.tolist() == [0, 0.25, 0.5, 1]
    assert (low <= share).all()
    assert (share <= high).all()
    assert (low[2], high[2]) == (0.5, 0.5)  # the groups do not mix: one is below, one above, in every resample


def test_the_probability_by_hand() -> None:
    # Pairs (1, 2), (1, 4), (3, 4) of four are won; a tie counts half.
    assert robust.probability_lower([1.0, 3.0], [2.0, 4.0], 0.95).estimate == 0.75
    assert robust.probability_lower([1.0], [1.0], 0.95).estimate == 0.5
    assert math.isnan(robust.probability_lower([1.0], [2.0, 3.0], 0.95).low)
    assert math.isnan(robust.probability_lower([], [2.0], 0.95).estimate)


@given(values, values)
def test_the_probability_equals_mann_whitney(a: list[float], b: list[float]) -> None:
    ours = robust.probability_lower(a, b, 0.95)
    theirs = scipy.stats.mannwhitneyu(b, a, method="asymptotic").statistic / (len(a) * len(b))
    assert ours.estimate == pytest.approx(theirs)
    assert 0 <= ours.low <= ours.estimate <= ours.high <= 1
    mirrored = robust.probability_lower(b, a, 0.95)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - ours.high, 1 - ours.low), abs=1e-6)


def test_newcombes_ends_solve_his_equation() -> None:
    a, b = [1.0, 2.0, 5.0], [3.0, 4.0, 6.0, 7.0]
    found, z = robust.probability_lower(a, b, 0.9), scipy.stats.norm.ppf(0.95)
    for end in (found.low, found.high):
        size = (3 + 4) / 2 - 1
        variance = end * (1 - end) * (1 + size * ((1 - end) / (2 - end) + end / (1 + end))) / (3 * 4)
        assert abs(found.estimate - end) == pytest.approx(z * math.sqrt(variance))


def test_no_overlap_of_three_and_three_seeds_is_no_certainty() -> None:
    found = robust.probability_lower([1.0, 2.0, 3.0], [4.0, 5.0, 6.0], 0.95)
    assert (found.estimate, found.high) == (1, 1)
    assert 0.5 < found.low < 0.8


def test_the_interval_covers_what_it_says() -> None:
    draws = np.random.default_rng(3)
    truth = float(scipy.stats.norm.cdf(1 / math.sqrt(2)))  # means one standard deviation apart
    found = [robust.probability_lower(draws.normal(-1, 1, 5), draws.normal(0, 1, 5), 0.95) for _ in range(300)]
    assert np.mean([one.low <= truth <= one.high for one in found]) > 0.9


@given(values)
def test_rank_correlation_equals_scipy(a: list[float]) -> None:
    b = [value**3 + (place % 3) for place, value in enumerate(a)]
    ours = robust.rank_correlation(a, b, 0.95)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert math.isnan(ours.estimate)
    else:
        assert ours.estimate == pytest.approx(scipy.stats.spearmanr(a, b).statistic)


def test_the_interval_of_a_rank_correlation_by_hand() -> None:
    a = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    b = [2.0, 1.0, 4.0, 3.0, 6.0, 5.0]
    found = robust.rank_correlation(a, b, 0.95)
    rho = 1 - 6 * 6 / (6 * 35)  # six squared rank differences of 1
    assert found.estimate == pytest.approx(rho)
    for end in (found.low, found.high):  # so many of its own standard errors away
        error = math.sqrt((1.15 + math.atanh(end) ** 2 / 4) / 3)
        assert abs(math.atanh(end) - math.atanh(rho)) == pytest.approx(1.959964 * error)
    assert math.isnan(robust.rank_correlation(a[:4], b[:4], 0.95).low)


@pytest.mark.parametrize("n", [5, 8, 20])
def test_the_same_order_is_no_certainty(n: int) -> None:
    found = robust.rank_correlation(range(n), range(n), 0.95)
    assert (found.estimate, found.high) == pytest.approx((1, 1))
    assert found.low < 0.999
    mirrored = robust.rank_correlation(range(n), range(n, 0, -1), 0.95)
    assert (mirrored.estimate, mirrored.low, mirrored.high) == pytest.approx((-1, -1, -found.low))


def test_five_in_the_same_order_by_hand() -> None:
    most = 1 - 6 / (5 * 24)  # an adjacent swap is 1 - 12 / 120
    low = robust.rank_correlation(range(5), range(5), 0.95).low
    error = math.sqrt((1.15 + math.atanh(low) ** 2 / 4) / 2)
    assert math.atanh(most) - math.atanh(low) == pytest.approx(1.959964 * error)
    certain = robust.rank_correlation(range(5), range(5), 0.999)
    assert (certain.low, certain.high) == (-1, 1)
    # A tie among a hundred lies above that middle, and the interval has its estimate in it all the same.
    tied = robust.rank_correlation([0, *range(99)], range(100), 0.95)
    assert tied.low < tied.estimate <= tied.high < 1


@pytest.mark.parametrize("r", [0.0, 0.5, 0.9, 0.97, 0.99])
@pytest.mark.parametrize("n", [5, 8, 12, 20])
def test_the_interval_of_a_rank_correlation_covers_what_it_says(n: int, r: float) -> None:
    draws = np.random.default_rng(n)
    truth = 6 / math.pi * math.asin(r / 2)  # Spearman's rho of normal pairs
    first = draws.normal(size=(300, n))
    second = r * first + math.sqrt(1 - r * r) * draws.normal(size=(300, n))
    found = [robust.rank_correlation(a.tolist(), b.tolist(), 0.95) for a, b in zip(first, second, strict=True)]
    assert np.mean([one.low <= truth <= one.high for one in found]) > 0.92
