"""FID and KID from features, by torch-fidelity's definitions; every sum is float64.

FID (Heusel et al. 2017): |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2). With roots S1 = A'A, S2 = B'B the last
trace is the sum of the singular values of A B', or of the roots of the eigenvalues of the symmetric A S2 A': nothing
complex or NaN can come out of round-off. With n <= D examples the centred features are the root: an n x n problem.
KID (Binkowski et al. 2018): unbiased squared MMD under the kernel (x'y / D + 1)^3, mean over random subsets.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from raysparse import rng
from raysparse.errors import UsageError
from raysparse.metrics.protocol import Protocol, Score, same_protocol

__all__ = ["Protocol", "Score", "Statistics", "fid", "kid", "kid_of_subsets", "same_protocol", "statistics"]

Matrix = NDArray[np.float64]
KID_SUBSETS = 100  # torch-fidelity's defaults
KID_SUBSET_SIZE = 1000


class Statistics:
    """Mean and covariance of n feature vectors; the root is made when first asked for and kept.

    mean: float64 [D]; root: float64 [r, D] with root' root = the unbiased covariance [D, D], r <= min(n, D); count: n.
    """

    def __init__(
        self, mean: Matrix, count: int, *, covariance: Matrix | None = None, root: Matrix | None = None
    ) -> None:
        if covariance is None and root is None:
            raise ValueError("statistics need a covariance or a root of it")
        self.mean, self.count = mean, count
        self._covariance, self._root = covariance, root

    @property
    def root(self) -> Matrix:
        if self._root is None:
            assert self._covariance is not None
            self._root = _root(self._covariance)
        return self._root

    @property
    def covariance(self) -> Matrix:
        """float64 [D, D]."""
        return self.root.T @ self.root if self._covariance is None else self._covariance

    @property
    def trace(self) -> float:
        """Of the covariance."""
        return float(np.square(self.root).sum() if self._covariance is None else np.trace(self._covariance))

    @property
    def wide(self) -> bool:
        """Fewer examples than make a full covariance: the root is the centred features."""
        return self.count <= len(self.mean)

    @property
    def rootless(self) -> bool:
        """Whether asking for the root will cost its making."""
        return self._root is None

    @classmethod
    def from_covariance(cls, mean: ArrayLike, covariance: ArrayLike, count: int) -> Statistics:
        """From torch-fidelity's pair mu [D], sigma [D, D]."""
        return cls(_finite(mean), count, covariance=_finite(covariance))


def statistics(features: torch.Tensor | ArrayLike) -> Statistics:
    """Statistics of `features`: any float dtype [n, D], n >= 2. UsageError for fewer or for values not finite."""
    x = _matrix(features)
    if len(x) < 2:
        raise UsageError(f"a FID needs at least 2 images on each side, got {len(x)}; generate or load more")
    mean = x.mean(axis=0)
    centred = (x - mean) / np.sqrt(len(x) - 1)
    if len(x) <= x.shape[1]:
        return Statistics(mean, len(x), root=centred)
    return Statistics(mean, len(x), covariance=centred.T @ centred)


def fid(a: Statistics, b: Statistics) -> float:
    """Fréchet distance of two sets of features of the same width D; >= 0, 0 for equal statistics up to round-off."""
    if a.mean.shape != b.mean.shape:
        raise UsageError(f"features of width {len(a.mean)} against {len(b.mean)}; use one extractor for both sides")
    difference = a.mean - b.mean
    rest = float(difference @ difference) + a.trace + b.trace
    return max(0.0, rest - 2 * _root_trace(a, b))


def _root_trace(a: Statistics, b: Statistics) -> float:
    """tr (S1 S2)^(1/2).

    Both full: eigenvalues of A S2 A', four times faster than singular values. Squaring costs nothing there, because a
    pivoted Cholesky root is graded: with spectra over 7 decades it agrees with a closed form to 1e-10. Centred
    features are not graded (7e-7 there), so with n <= D on a side singular values of A B' are taken: a small problem.
    """
    if a.wide or b.wide:
        cross = a.root @ b.root.T
        return float(np.linalg.svd(cross, compute_uv=False).sum()) if cross.size else 0.0
    first, second = (b, a) if a.rootless else (a, b)  # a root that is there already saves making one
    values = np.linalg.eigvalsh(first.root @ second.covariance @ first.root.T)
    return float(np.sqrt(np.clip(values, 0, None)).sum())


def kid(
    a: torch.Tensor | ArrayLike,
    b: torch.Tensor | ArrayLike,
    *,
    subsets: int = KID_SUBSETS,
    subset_size: int = KID_SUBSET_SIZE,
    seed: int = 0,
    device: torch.device | None = None,
) -> tuple[float, float]:
    """Mean and standard deviation of the squared MMD over random subsets of features a [n, D] and b [m, D].

    Subsets are drawn without replacement from (seed, "kid subsets"). device: a GPU to compute on. UsageError where a
    side is smaller than `subset_size`: a smaller size is another protocol, so the caller chooses and records it.
    """
    x, y = _matrix(a), _matrix(b)
    if subset_size < 2 or subsets < 1:
        raise UsageError(f"KID needs subsets >= 1 and subset_size >= 2, got {subsets} and {subset_size}")
    if min(len(x), len(y)) < subset_size:
        raise UsageError(
            f"KID with subset_size {subset_size} needs as many images on each side, got {len(x)} and {len(y)}; "
            "generate more or set a smaller subset_size (it becomes part of the protocol)"
        )
    draw = rng.numpy_generator(seed, "kid subsets")
    of_a, of_b = (np.stack([draw.permutation(n)[:subset_size] for _ in range(subsets)]) for n in (len(x), len(y)))
    values = kid_of_subsets(x, y, of_a, of_b, device)
    return float(values.mean()), float(values.std())


def kid_of_subsets(
    a: ArrayLike, b: ArrayLike, of_a: NDArray[Any], of_b: NDArray[Any], device: torch.device | None = None
) -> Matrix:
    """Squared MMD of each pair of subsets: float64 [k]. of_a, of_b: row numbers, int [k, size], distinct in a row."""
    x, y = _matrix(a), _matrix(b)
    if x.shape[1] != y.shape[1]:
        raise UsageError(f"features of width {x.shape[1]} against {y.shape[1]}; use one extractor for both sides")
    whole = len(x) ** 2 + len(x) * len(y) + len(y) ** 2
    if whole > 3 * of_a.size * of_a.shape[1]:  # few subsets of large sets: fewer kernel values subset by subset
        every = np.arange(of_a.shape[1])[None]
        pairs = zip(of_a, of_b, strict=True)
        return np.concatenate([_mmd(x[i], y[j], every, every, device) for i, j in pairs])
    return _mmd(x, y, of_a, of_b, device)


def _mmd(x: Matrix, y: Matrix, of_x: NDArray[Any], of_y: NDArray[Any], device: torch.device | None) -> Matrix:
    """All subsets from one pass over the kernel matrices: a subset's sum is w'Kw with w its 0/1 indicator."""
    size = of_x.shape[1]
    given: list[Any] = [x, y, _indicators(of_x, len(x)), _indicators(of_y, len(y))]
    if device is not None and device.type == "cuda":
        given = [torch.from_numpy(part).to(device) for part in given]
    # On a CPU by NumPy: 100 subsets of 10,000 take 3.8 s on a core of an EPYC, by PyTorch (MKL) 12.6.
    found = _subset_mmd(given[0], given[1], given[2], given[3], size)
    return np.asarray(found.cpu() if isinstance(found, torch.Tensor) else found)


def _subset_mmd(x: Any, y: Any, in_x: Any, in_y: Any, size: int) -> Any:
    """float64 [k], all NumPy's or all PyTorch's. in_x, in_y: the subsets' indicators [k, n] and [k, m]."""
    within = [
        _kernel_sums(z, z, w, w, same=True) - w @ _kernel((z * z).sum(1), z.shape[1]) for z, w in ((x, in_x), (y, in_y))
    ]
    return (within[0] + within[1]) / (size * (size - 1)) - 2 * _kernel_sums(x, y, in_x, in_y) / size**2


def _kernel_sums(x: Any, y: Any, in_x: Any, in_y: Any, same: bool = False, block: int = 1024) -> Any:
    """w_x' K(x, y) w_y for each pair of indicator rows: float64 [k]; memory of one block of rows of K.

    same: x is y, and of K, which is symmetric, what lies right of the blocks on the diagonal counts twice.
    """

    def of(rows: slice, columns: slice) -> Any:
        return (in_x[:, rows] * (in_y[:, columns] @ _kernel(y[columns] @ x[rows].T, x.shape[1]))).sum(1)

    parts = [slice(start, start + block) for start in range(0, len(x), block)]
    if same:
        return sum(of(part, part) + 2 * of(part, slice(part.stop, None)) for part in parts)
    return sum(of(part, slice(None)) for part in parts)


def _kernel(products: Any, width: int) -> Any:
    shifted = products / width + 1.0
    return shifted * shifted * shifted  # numpy's ** 3 calls pow: 20 times slower


def _indicators(subsets: NDArray[Any], n: int) -> Matrix:
    flags = np.zeros((len(subsets), n))
    np.put_along_axis(flags, subsets, 1.0, axis=1)
    return flags


def _root(covariance: Matrix) -> Matrix:
    """float64 [r, D], root' root = covariance, by pivoted Cholesky: constant features and rank < D need no jitter."""
    import scipy.linalg  # here: a machine with PyTorch alone (benchmarks/fid.py) takes the reference's root as given

    factor, pivots, rank, _ = scipy.linalg.lapack.dpstrf(covariance, lower=0)
    root = np.zeros((rank, len(covariance)))
    root[:, pivots - 1] = np.triu(factor)[:rank]
    return root


def _matrix(features: torch.Tensor | ArrayLike) -> Matrix:
    x = features.detach().cpu().numpy() if isinstance(features, torch.Tensor) else features
    x = _finite(x)
    if x.ndim != 2:
        raise ValueError(f"features must be [n, D], got shape {x.shape}")
    return x


def _finite(values: ArrayLike) -> Matrix:
    x = np.asarray(values, dtype=np.float64)
    if not np.isfinite(x).all():
        raise UsageError("features are not finite: the images or the extractor's weights are damaged")
    return x
