"""Whole B x B blocks of a matrix [n_out, n_in], B from 4 to 64; B divides both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raysparse.sparse.pattern import Pattern, Shape, matrix, nothing_to_check

if TYPE_CHECKING:
    from torch import Tensor

SETTINGS = frozenset({"block", "other_layers"})
FIXED: dict[str, Any] = {}
MATRICES_ONLY = True
check = nothing_to_check


class Blocks(Pattern):
    """Units [n_out / B, n_in / B]."""

    def __init__(self, shape: Shape, edge: int) -> None:
        super().__init__(shape)
        self.edge = edge
        self.units = (shape[0] // edge, shape[1] // edge)

    def total(self, values: Tensor) -> Tensor:
        return self._cut(values.contiguous()).float().sum((1, 3))  # one order of sums in any memory format

    def spread(self, units: Tensor) -> Tensor:
        rows, columns = self.units
        wide = units.reshape(rows, 1, columns, 1).expand(rows, self.edge, columns, self.edge)
        return wide.reshape(self.shape)

    def of_mask(self, mask: Tensor) -> Tensor:
        return self._cut(mask)[:, 0, :, 0]

    def _cut(self, values: Tensor) -> Tensor:
        return values.reshape(self.units[0], self.edge, self.units[1], self.edge)


def of(shape: Shape, settings: Any) -> Pattern | str:
    """The blocks, or why a matrix cannot be cut into them."""
    edge, sides = settings.block, matrix(shape)
    assert sides is not None
    if sides[0] % edge or sides[1] % edge:
        return f"blocks of {edge} x {edge} do not divide {sides[0]} x {sides[1]}"
    return Blocks(shape, edge)
