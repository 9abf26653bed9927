"""ChiroDiff's weights in the form in which the compiled kernels for sampling walk them."""

from __future__ import annotations

import ctypes
import itertools
import math

import torch
from torch import Tensor, nn

from raysparse.models import _sparse_layout as layout

# The columns of a side are walked in passes of what fits the first cache; a side of at most this density in one, for
# its sums' way to memory and back costs more. On an Intel Xeon, h = 96 to 256, 64 sketches: one pass takes 1.13 to 1.2
# times as long at density .5, 1.1 to 1.16 at .25, .99 to 1.08 at .1 and .94 at .05 (an AMD EPYC: 1.1, 1.13 to 1.2, .96
# to 1.07, .84 to .92); three quarters or 1.4 times of the cache at a time are at most .9 to 1.1 times as fast.
_ONE_PASS = 0.07


class Packed:
    """Holds what the kernel's pointers point at.

    dense_from: the density from which on all weights of a direction of a layer are multiplied.
    """

    def __init__(self, library: ctypes.CDLL, dense_from: float) -> None:
        self.library = library
        self.dense_from = dense_from
        self.row = 4 * library.raysparse_width()  # bytes of one feature
        self._kept: list[Tensor] = []

    def keep(self, tensor: Tensor) -> int:
        """Its address, for as long as this object lives."""
        assert tensor.dtype == torch.float32 or not tensor.is_floating_point()  # what the kernels take it for
        self._kept.append(tensor.contiguous())
        return self._kept[-1].data_ptr()

    def side(
        self, w_in: Tensor, w_state: Tensor, bias: Tensor, before: int, to: int, *, input_only: bool = False
    ) -> layout.Side:
        """One direction of a layer: W_ih [3 h, inputs], W_hh [3 h, h], the gates' biases; before, to: see gru.h.

        input_only: the products with the states are left out.
        """
        used = w_in != 0, w_state != 0
        inputs, columns = w_in.shape[1], w_in.shape[1] + (0 if input_only else w_state.shape[1])
        active = int(used[0].sum()) + (0 if input_only else int(used[1].sum()))
        weights = len(w_in) * columns
        bias = bias * layout.gate_scales().repeat(len(bias) // 4)
        if active >= weights * self.dense_from:
            tiles = _tiles([w_in] if input_only else [w_in, w_state], self.library.raysparse_units())
            return layout.Side(None, None, *map(self.keep, (tiles, bias)), before, to, 1, 0)
        ends = _pass_ends(columns, active / weights, self.library.raysparse_features_in_cache())
        plans = [layout.plan(*used, before, self.row, *walked) for walked in itertools.pairwise((0, *ends))]
        counts, offsets, scale = (
            torch.cat([getattr(plan, name) for plan in plans]) for name in ("counts", "offsets", "scale")
        )
        values = torch.cat((w_in.flatten(), w_state.flatten()))[torch.cat([plan.active for plan in plans])] * scale
        pointers = map(self.keep, (counts, offsets, values, bias))
        return layout.Side(*pointers, before, to, len(ends), sum(end <= inputs for end in ends))


def _pass_ends(columns: int, density: float, fitting: int) -> list[int]:
    """Where the passes over the columns of a side end; fitting: columns that fit the first cache."""
    passes = 1 if density <= _ONE_PASS else math.ceil(columns / fitting)
    return [columns * (number + 1) // passes for number in range(passes)]


def _tiles(parts: list[Tensor], units: int) -> Tensor:
    """The weights of a dense side, block by block of `units` units: their inputs x (unit, gate), then their states'."""
    found, scales = [], layout.gate_scales()
    for weights in parts:
        hidden = len(weights) // 3
        by_gate = weights.reshape(3, hidden, -1) * scales[:3, None, None]  # q has the scale of n
        padded = nn.functional.pad(by_gate, (0, 0, 0, -hidden % units))
        blocks = padded.reshape(3, -1, units, weights.shape[1])
        found.append(blocks.permute(1, 3, 2, 0).flatten(1))
    return torch.cat(found, 1)
