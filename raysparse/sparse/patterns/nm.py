"""N:M: of each M weights in a row along the input axis, exactly N stay; N = (1 - S) M. Every layer has that density.

Weights are pruned one by one wherever their score is lowest in the layer; each group then grows as many as it lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raysparse.sparse.pattern import Pattern, Shape

if TYPE_CHECKING:
    from torch import Tensor

SETTINGS = frozenset({"m"})
FEW = 8  # weights of a group up to which each is compared with each; beyond, groups are sorted
FIXED: dict[str, Any] = {"allocation": "uniform"}
MATRICES_ONLY = False


def check(settings: Any) -> None:
    """ValueError where (1 - S) M is no whole number from 1 to M."""
    kept(settings.sparsity, settings.m)


def kept(sparsity: float, m: int) -> int:
    """N of N:M. ValueError where there is none."""
    n = round((1 - sparsity) * m)
    if not 1 <= n <= m or abs(n - (1 - sparsity) * m) > 1e-6:
        some = ", ".join(f"{1 - k / m:g}" for k in range(m, 0, -1)[:8])
        raise ValueError(f"sparsity {sparsity} leaves {(1 - sparsity) * m:g} of {m} weights; with m = {m} give {some}")
    return n


class Groups(Pattern):
    """Units are single weights; groups of M along axis 1, for each output and place in the kernel."""

    def __init__(self, shape: Shape, n: int, m: int) -> None:
        super().__init__(shape)
        self.n, self.m = n, m

    def valid(self, mask: Tensor) -> bool:
        return bool((self.grouped(mask).sum(-1) == self.n).all())

    def first(self, scores: Tensor, count: int) -> Tensor:
        import torch

        assert count * self.m == scores.numel() * self.n
        return self._best(scores, torch.full_like(self.grouped(scores)[..., :1], self.n, dtype=torch.int64))

    def grown(self, kept: Tensor, scores: Tensor, count: int) -> Tensor:
        lost = self.n - self.grouped(kept).sum(-1, keepdim=True)
        scores = scores.float().nan_to_num(nan=-3e38).masked_fill(kept, -float("inf"))
        return kept | self._best(scores, lost)

    def grouped(self, values: Tensor) -> Tensor:
        """[groups, M], a view or a copy, in the order of a weight whose input axis comes last."""
        return values.movedim(1, -1).reshape(-1, self.m)

    def _best(self, scores: Tensor, counts: Tensor) -> Tensor:
        """Mask of the `counts` [groups, 1] highest scores of each group; ties go to the lower index."""
        from raysparse.sparse.masks import on_host

        values = self.grouped(scores).float()
        if not on_host(values) or bool(values.isnan().any()):  # a look at a GPU costs more than the pass
            values = values.nan_to_num(nan=-3e38, posinf=float("inf"), neginf=-float("inf"))
        if self.m > FEW:
            place = values.argsort(dim=-1, descending=True, stable=True).argsort(-1)
            return self.spread_groups(place < counts)
        rows = values.T.contiguous()  # [M, groups]: whole rows are compared, 10 times faster than in groups of 4
        place = (rows != rows).char()  # zeros: how many of its group come before each
        for first in range(self.m):
            for second in range(first + 1, self.m):
                ahead = rows[second] > rows[first]
                place[first] += ahead
                place[second] += ~ahead
        return self.spread_groups((place < counts.T).T)

    def spread_groups(self, groups: Tensor) -> Tensor:
        """[groups, M] -> the weight's shape; `grouped` undone."""
        moved = (self.shape[0], *self.shape[2:], self.shape[1])
        return groups.reshape(moved).movedim(-1, 1).contiguous()


def of(shape: Shape, settings: Any) -> Pattern | str:
    """The groups, or why the input axis cannot be cut into them."""
    if shape[1] % settings.m:
        return f"groups of {settings.m} do not divide {shape[1]} inputs"
    return Groups(shape, kept(settings.sparsity, settings.m), settings.m)
