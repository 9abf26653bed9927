"""What is pruned and grown as one: the units that a weight is cut into. A pattern's file overrides what differs.

Patterns import no torch until they are used, so that settings can be checked without it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Shape = Sequence[int]


class Pattern:
    """One layer's units, all of the same number of weights; here each weight is one.

    shape: of the weight, [n_out, n_in, *kernel].
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = tuple(shape)
        self.units: tuple[int, ...] = self.shape  # the shape of one number per unit
        self.smallest = 1  # how many units the layer keeps at least

    @property
    def size(self) -> int:
        """Weights per unit."""
        return math.prod(self.shape) // math.prod(self.units)

    def total(self, values: Tensor) -> Tensor:
        """[weight's shape] -> [units]: the sum over each unit, floating point."""
        return values

    def spread(self, units: Tensor) -> Tensor:
        """[units] -> [weight's shape]: each unit's value at all its weights."""
        return units

    def of_mask(self, mask: Tensor) -> Tensor:
        """The units of a mask that is made of whole ones: bool [weight's shape] -> bool [units]."""
        return mask

    def valid(self, mask: Tensor) -> bool:
        """Whether a mask of the layer keeps the pattern."""
        return bool((self.spread(self.of_mask(mask)) == mask).all())

    def count(self, active: int) -> int:
        """Units of so many active weights."""
        return active // self.size

    def first(self, scores: Tensor, count: int) -> Tensor:
        """The first mask, by units: bool [units] with `count` ones, where the scores are highest."""
        from raysparse.sparse.masks import highest

        return highest(scores, count, scores == scores)

    def pruned(self, units: Tensor, scores: Tensor, count: int) -> Tensor:
        """`units` without the `count` of lowest scores."""
        from raysparse.sparse.masks import lowest

        return units & ~lowest(scores, count, units)

    def grown(self, kept: Tensor, scores: Tensor, count: int) -> Tensor:
        """`kept` and `count` more, as many as were pruned, of the highest scores among what is not kept."""
        from raysparse.sparse.masks import highest

        return kept | highest(scores, count, ~kept)


def matrix(shape: Shape) -> tuple[int, int] | None:
    """[n_out, n_in] of a linear layer, a GRU's weight or a convolution of kernel 1; None for another."""
    return (shape[0], shape[1]) if math.prod(shape[2:]) == 1 else None


def nothing_to_check(settings: Any) -> None:
    """The `check` of a pattern that fits any settings."""
