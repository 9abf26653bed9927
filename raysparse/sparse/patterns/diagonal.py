"""Whole wrapped diagonals of a matrix, as DynaDiag's (Tyagi et al. 2025, arXiv 2506.11449).

A matrix of r x c, r <= c, has c of them: diagonal d holds (i, (i + d) mod c) for i < r. Where r > c, the transpose's.
So every matrix is cut into max(r, c) diagonals of min(r, c) weights each, one in each row (or column).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raysparse.sparse.pattern import Pattern, Shape, matrix, nothing_to_check

if TYPE_CHECKING:
    from torch import Tensor

SETTINGS = frozenset({"other_layers"})
FIXED: dict[str, Any] = {}
MATRICES_ONLY = True
check = nothing_to_check


class Diagonals(Pattern):
    """Units [max(n_out, n_in)]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.short, self.long = sorted(shape[:2])
        self.tall = shape[0] > shape[1]
        self.units = (self.long,)

    def total(self, values: Tensor) -> Tensor:
        return self._aligned(values).float().sum(0)

    def spread(self, units: Tensor) -> Tensor:
        wide = units.gather(0, self._offsets(units)).reshape(self.short, self.long)  # (i, j) is on diagonal j - i
        return (wide.T if self.tall else wide).reshape(self.shape)

    def of_mask(self, mask: Tensor) -> Tensor:
        return self._aligned(mask)[0]

    def _aligned(self, values: Tensor) -> Tensor:
        """[short, long]: column d is diagonal d."""
        flat = values.reshape(self.shape[:2])
        flat = (flat.T if self.tall else flat).contiguous()  # one order of sums in any memory format
        rows = _arange(self.short, flat).unsqueeze(1)
        return flat.gather(1, (rows + _arange(self.long, flat)) % self.long)

    def _offsets(self, like: Tensor) -> Tensor:
        rows = _arange(self.short, like).unsqueeze(1)
        return ((_arange(self.long, like) - rows) % self.long).reshape(-1)


def _arange(count: int, like: Tensor) -> Tensor:
    import torch

    return torch.arange(count, device=like.device)


def of(shape: Shape, settings: Any) -> Pattern | str:
    """The diagonals; every matrix has them."""
    assert matrix(shape) is not None
    return Diagonals(shape)
