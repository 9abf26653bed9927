"""FID and KID against torch-fidelity, against scipy's matrix root, and where those break."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from raysparse.errors import UsageError
from raysparse.metrics import fidelity
from raysparse.metrics.fidelity import Statistics, fid, kid, kid_of_subsets, statistics


def features(n: int, width: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """Correlated, with a spectrum over four decades, like a network's features: float64 [n, width]."""
    draw = np.random.default_rng(seed)
    mix = np.linalg.qr(draw.normal(size=(width, width)))[0] * np.geomspace(1, 1e-2, width)
    return draw.normal(size=(n, width)) @ mix + shift * draw.normal(size=width)


def theirs(a: np.ndarray, b: np.ndarray) -> float:
    pair = [fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    return fid_statistics_to_metric(*pair, False)["frechet_inception_distance"]


@pytest.mark.parametrize("width", [64, 200, 512])
def test_fid_is_torch_fidelitys(width):
    a, b = features(2 * width + 10, width, 1), features(3 * width, width, 2, shift=0.1)
    assert fid(statistics(a), statistics(b)) == pytest.approx(theirs(a, b), rel=1e-5)


def test_fid_of_a_mean_and_covariance_is_that_of_the_features():
    a, b = features(300, 32, 1), features(200, 32, 2)
    pairs = [fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    made = [Statistics.from_covariance(p["mu"], p["sigma"], len(x)) for p, x in zip(pairs, (a, b), strict=True)]
    assert fid(*made) == pytest.approx(fid(statistics(a), statistics(b)), rel=1e-9)


def exact(a: np.ndarray, b: np.ndarray) -> float:
    """By eigenvalues of S1^(1/2) S2 S1^(1/2): the rank is known, so round-off in the null space is cut off."""
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(s1)
    half = vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T
    rank = min(len(a), len(b)) - 1
    trace = np.sqrt(np.sort(np.linalg.eigvalsh(half @ s2 @ half))[::-1][:rank]).sum()
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(s1) + np.trace(s2) - 2 * trace)


@pytest.mark.parametrize(("n", "m"), [(20, 200), (200, 20), (20, 30), (64, 64), (2, 2)])
def test_fid_is_right_with_fewer_images_than_features(n, m):
    a, b = features(n, 64, 3), features(m, 64, 4, shift=0.1)
    assert fid(statistics(a), statistics(b)) == pytest.approx(exact(a, b), rel=1e-7)


def test_fid_is_that_of_scipys_matrix_root():
    a, b = features(100, 12, 5), features(90, 12, 6)
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    want = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert fid(statistics(a), statistics(b)) == pytest.approx(want, rel=1e-9)


def test_fid_of_two_normals_by_hand():
    # Covariances diag(4, 1) and diag(1, 9), means 3 apart: 9 + (2-1)^2 + (1-3)^2 = 14.
    a = Statistics(np.zeros(2), 10, root=np.diag([2.0, 1.0]))
    b = Statistics(np.array([3.0, 0.0]), 10, covariance=np.diag([1.0, 9.0]))
    assert fid(a, b) == pytest.approx(14)
    assert fid(b, a) == pytest.approx(14)
    with pytest.raises(ValueError, match="covariance or a root"):
        Statistics(np.zeros(2), 10)


def test_a_spectrum_too_wide_for_eigenvalues_is_still_right():
    # Commuting covariances: sum (s1 - s2)^2 in closed form. Squared, the small ones lie far below round-off.
    one, two = np.geomspace(1, 1e-7, 200), np.geomspace(1, 1e-7, 200) * 1.01
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(200, 200)))[0]
    a, b = (Statistics(np.zeros(200), 300, covariance=(turn * s**2) @ turn.T) for s in (one, two))
    assert fid(a, b) == pytest.approx(np.square(one - two).sum(), rel=1e-5)


def test_fid_of_equal_sets_is_zero_and_of_dead_features_finite():
    a = features(300, 40, 7)
    a[:, ::3] = 0.25  # a ReLU that never fires: zero variance
    same = statistics(a)
    assert 0 <= fid(same, same) < 1e-9
    constant = statistics(np.full((50, 40), 0.25))
    assert fid(same, constant) == pytest.approx(np.trace(np.cov(a, rowvar=False)) + np.sum((a.mean(0) - 0.25) ** 2))


def test_fid_is_symmetric_and_takes_float32_tensors():
    a, b = features(100, 30, 8), features(20, 30, 9)
    forth, back = fid(statistics(a), statistics(b)), fid(statistics(b), statistics(a))
    assert forth == pytest.approx(back, rel=1e-12)
    assert fid(statistics(torch.from_numpy(a).float()), statistics(b)) == pytest.approx(forth, rel=1e-5)


def test_what_has_no_fid_is_refused():
    with pytest.raises(UsageError, match="at least 2 images"):
        statistics(np.zeros((1, 4)))
    with pytest.raises(UsageError, match="not finite"):
        statistics(np.full((4, 4), np.nan))
    with pytest.raises(UsageError, match="one extractor"):
        fid(statistics(np.eye(4)), statistics(np.eye(5)))


@pytest.mark.parametrize(("n", "m"), [(120, 90), (1500, 2000)])  # one pass over all pairs; subset by subset
def test_kid_is_torch_fidelitys_given_the_same_subsets(n, m):
    subsets, size, seed = 10, 60, 2020
    a, b = features(n, 24, 1), features(m, 24, 2, shift=0.3)
    want = kid_features_to_metric(
        torch.from_numpy(a),
        torch.from_numpy(b),
        kid_subsets=subsets,
        kid_subset_size=size,
        rng_seed=seed,
        verbose=False,
    )
    draw = np.random.RandomState(seed)  # the generator and the order in which torch-fidelity draws
    pairs = [(draw.choice(n, size, replace=False), draw.choice(m, size, replace=False)) for _ in range(subsets)]
    values = kid_of_subsets(a, b, *(np.stack(side) for side in zip(*pairs, strict=True)))
    assert values.mean() == pytest.approx(want["kernel_inception_distance_mean"], rel=1e-9)
    assert values.std() == pytest.approx(want["kernel_inception_distance_std"], rel=1e-9)


def test_kid_by_pytorch_is_the_same():
    a, b, flags = features(1100, 24, 1), features(900, 24, 2, shift=0.3), np.random.default_rng(0).random((10, 1100))
    given = [np.asarray(part, np.float64) for part in (a, b, flags < 0.1, flags[:, :900] < 0.1)]
    want = fidelity._subset_mmd(*given, 100)
    found = fidelity._subset_mmd(*map(torch.from_numpy, given), 100)
    np.testing.assert_allclose(found.numpy(), want, rtol=0, atol=1e-12 * float(np.abs(want).max()) + 1e-13)


@pytest.mark.gpu
def test_kid_on_a_gpu_is_the_same():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    a, b = features(400, 24, 1), features(500, 24, 2, shift=0.3)
    for size in (100, 10):  # one pass over all pairs; subset by subset
        want, found = (kid(a, b, subsets=50, subset_size=size, device=torch.device(on)) for on in ("cpu", "cuda"))
        assert found == pytest.approx(want, rel=1e-9)


def test_kid_draws_from_its_seed_and_agrees_with_torch_fidelity_within_the_subsets_spread():
    a, b = features(400, 24, 1), features(500, 24, 2, shift=0.3)
    mean, std = kid(a, b, subsets=50, subset_size=100, seed=3)
    assert (mean, std) == kid(a, b, subsets=50, subset_size=100, seed=3)
    assert (mean, std) != kid(a, b, subsets=50, subset_size=100, seed=4)
    want = kid_features_to_metric(
        torch.from_numpy(a), torch.from_numpy(b), kid_subsets=50, kid_subset_size=100, verbose=False
    )
    assert mean == pytest.approx(want["kernel_inception_distance_mean"], abs=4 * std / np.sqrt(50))


def test_kid_of_one_distribution_is_near_zero_and_grows_with_the_shift():
    a = features(600, 16, 1)
    shifted = [kid(a, features(600, 16, 2) + shift, subsets=20, subset_size=300)[0] for shift in (0, 0.3, 0.6)]
    assert abs(shifted[0]) < shifted[1] / 10 < shifted[2] / 10


def test_kid_with_too_few_images_says_what_to_do():
    with pytest.raises(UsageError, match=r"subset_size 1000 needs as many.*got 50 and 2000.*smaller subset_size"):
        kid(np.ones((50, 3)), np.ones((2000, 3)))
    with pytest.raises(UsageError, match="subset_size >= 2"):
        kid(np.ones((50, 3)), np.ones((50, 3)), subset_size=1)
