"""How ChiroDiff's weights are handed to the compiled kernel for few sketches; see native/few.h."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor, nn

from raysparse.models import _sparse_layout as layout
from raysparse.models._sparse_memory import Memory
from raysparse.models._sparse_sides import Packed
from raysparse.models.chirodiff import BY_POINT, ChiroDiff

# By the lanes of a vector: a slot takes so many times as long as a vector of the product with all weights, where those
# lie in the first cache, and where they do not. On an AMD EPYC the whole prediction for one sketch takes by slots 1.08
# and .97 times as long with .57 and .4 slots a vector at h = 32 and 48, .9 and 1.08 with .66 and .83 at h = 64 to 256;
# with 8 lanes .94 to 1.08 and 1.18 to 1.2 with .27 to .47 and .74.
_SLOT = {16: (2.3, 1.35), 8: (4.2, 2.3), 4: (6.0, 3.6)}


class Side(ctypes.Structure):
    _fields_ = [("input", layout.Side), *layout.fields("states places slots", ctypes.c_void_p)]


class Layer(ctypes.Structure):
    _fields_ = [("sides", Side * 2), ("inputs", ctypes.c_int32)]


class Net(ctypes.Structure):
    _fields_ = [("layers", ctypes.POINTER(Layer)), ("head", layout.Head), ("layer_count", ctypes.c_int32)]


class FewSketches:
    """The prediction for few sketches, one after the other."""

    def __init__(self, model: ChiroDiff, packed: Packed, head: Tensor) -> None:
        self._library, self._packed = packed.library, packed
        self._library.raysparse_few_scratch.restype = ctypes.c_int64
        hidden, count = model.config.hidden, model.config.layers
        self._layers = (Layer * count)()
        for layer in range(count):
            self._layers[layer].inputs = inputs = 2 * hidden if layer else BY_POINT
            for side, end in enumerate(layout.SIDES):
                w_in, w_state, bias = layout.direction(model, layer, end)
                self._layers[layer].sides[side] = self._side(w_in[:, :inputs], w_state, bias)
        found = layout.Head.of(model, packed.keep(head), 0)
        self._net = Net(self._layers, found, count)

    def predict(self, sketches: layout.Sketches, memory: Memory, threads: int) -> None:
        """Into what `sketches` points at."""
        each = self._library.raysparse_few_scratch(ctypes.byref(self._net), ctypes.c_int64(sketches.points))
        place = ctypes.c_void_p(memory.at_least(threads * each))  # .5 MB each at h = 96 and 165 points
        self._library.raysparse_predict_few(
            ctypes.byref(self._net), ctypes.byref(sketches), place, ctypes.c_int32(threads)
        )

    def _side(self, w_in: Tensor, w_state: Tensor, bias: Tensor) -> Side:
        of_input = self._packed.side(w_in, w_state, bias, 0, 0, input_only=True)
        lanes, hidden = self._library.raysparse_lanes(), w_state.shape[1]
        scaled = (w_state.view(3, -1) * layout.gate_scales()[:3, None]).view(3 * hidden, hidden)
        dense_from = self._packed.dense_from
        if float(w_state.count_nonzero()) < dense_from * w_state.numel():
            found = slots(scaled, lanes, self._library.raysparse_columns())
            cache = self._library.raysparse_features_in_cache() * self._packed.row  # bytes
            cost = _SLOT[lanes][w_state.nbytes > cache]
            if dense_from > 1 or len(found.values) * cost < 3 * hidden * -(-hidden // lanes):
                return Side(of_input, *map(self._packed.keep, found))
        return Side(of_input, self._packed.keep(dense_states(scaled, lanes)), None, None)


class Slots(NamedTuple):
    """One direction's products with the states before."""

    values: Tensor  # float32 [slots, lanes]
    places: Tensor  # uint8 [slots, lanes]
    counts: Tensor  # int32 [blocks, 3, groups]


def slots(weight: Tensor, lanes: int, columns: int) -> Slots:
    """Of W_hh [3 h, h], rows r, z, q."""
    hidden = weight.shape[1]
    by_gate = nn.functional.pad(weight.view(3, hidden, hidden), (0, -hidden % columns, 0, -hidden % lanes))
    by_block = by_gate.view(3, -1, lanes, by_gate.shape[2] // columns, columns).permute(1, 0, 3, 2, 4)
    used = by_block != 0  # [blocks, 3, groups, lanes, columns]
    counts = used.sum(4).amax(3)
    begins = counts.flatten().cumsum(0).view(counts.shape) - counts
    rank = used.cumsum(4) - 1
    block, gate, group, lane, column = used.nonzero(as_tuple=True)
    at = begins[block, gate, group] + rank[block, gate, group, lane, column], lane
    values = weight.new_zeros(int(counts.sum()), lanes)
    values[at] = by_block[block, gate, group, lane, column]
    places = torch.zeros(values.shape, dtype=torch.uint8)
    places[at] = column.to(torch.uint8)
    return Slots(values, places, counts.int())


def dense_states(weight: Tensor, lanes: int) -> Tensor:
    """W_hh [3 h, h] by pairs of blocks of units, a last one alone: [h, blocks, 3, lanes] of each, flattened."""
    hidden = weight.shape[1]
    by_gate = nn.functional.pad(weight.view(3, hidden, hidden), (0, 0, 0, -hidden % lanes))
    blocks = by_gate.view(3, -1, lanes, hidden).permute(1, 3, 0, 2)  # [blocks, h, 3, lanes]
    return torch.cat([pair.transpose(0, 1).flatten() for pair in torch.split(blocks, 2)])
