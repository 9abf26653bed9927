"""ChiroDiff's prediction on a CPU through a compiled kernel that skips the weights that are 0: for sampling.

What it computes is what `ChiroDiff.forward` computes, to rounding. Beside skipping zeros it leaves out what a point
need not repeat: the time features and the class are the same for all points of a sketch, so their part of the first
layer and of the output is computed once per sketch; and `mix` and `out`, with no activation between, are one product.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from raysparse import native
from raysparse.models import _cpu
from raysparse.models import _sparse_layout as layout
from raysparse.models._sparse_memory import Memory

_SOURCE = Path(__file__).parent / "native" / "chirodiff.cpp"
# A direction of a layer of at least this density is computed with all its weights. Times as long by skipping the zeros,
# h = 32 to 256, 64 sketches, on an Intel Xeon: .9 to 1.07 at density .95, .82 to 1.08 at .9, .83 to 1.01 at .85, .75 to
# 1.01 at .8, .7 to .9 at .6; on an AMD EPYC .89 to 1.1 at .99, .83 to 1.04 at .95, .83 to .99 at .9.
_DENSE = {"intel": 0.88, "amd": 0.97, "narrow": 0.97}[_cpu.KIND]
# The columns of a side are walked in passes of what fits the first cache; a side of at most this density in one, for
# its sums' way to memory and back costs more. On an Intel Xeon, h = 96 to 256, 64 sketches: one pass takes 1.13 to 1.2
# times as long at density .5, 1.1 to 1.16 at .25, .99 to 1.08 at .1 and .94 at .05 (an AMD EPYC: 1.1, 1.13 to 1.2, .96
# to 1.07, .84 to .92); three quarters or 1.4 times of the cache at a time are at most .9 to 1.1 times as fast.
_ONE_PASS = 0.07
# Few sketches leave the kernel's vectors empty: up to 16 take it as long as one, and PyTorch less. The kernel is chosen
# for at least (cost of the weights - _CALLS) / weights sketches, a weight costing _PER_ACTIVE or, of a dense side,
# _PER_DENSE. Of 96 cases on an Intel Xeon (h = 32 to 192, S = 0 to .9, 1 to 32 sketches, one thread) it was 1.05 to 6
# times as fast where it is chosen, but for one (.83), and .29 to 1.18 times where it is not; of 120 on an AMD EPYC 1.05
# to 6.7 times, and .4 to 1.17 times; with AVX2 1.04 to 7.9 times, and .41 to 1.29 times.
_PER_ACTIVE, _PER_DENSE = {"intel": (37.0, 18.0), "amd": (19.0, 12.5), "narrow": (14.5, 24.0)}[_cpu.KIND]
_CALLS = 2_900_000


class _Layer(ctypes.Structure):
    _fields_ = [("sides", layout.Side * 2), ("source", ctypes.c_int64), ("inputs", ctypes.c_int32)]


class _Net(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(_Layer)),
        ("head", layout.Head),
        ("layer_count", ctypes.c_int32),
        ("places", ctypes.c_int64),
    ]


class SparseChiroDiff(nn.Module):
    """A ChiroDiff as it is now, for sampling: same arguments, same prediction to rounding (1e-6), no gradients.

    The weights are copied: a change of the model's is not seen. A weight that is 0 takes no part, so one that is not
    finite spreads as in the model, but an input that is not finite is not multiplied with the zeros. Runs on
    torch.get_num_threads() threads; what comes out does not depend on how many. One call at a time.

    UsageError: no plain ChiroDiff of float32 on the CPU, or no compiler (see `native.load`).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = [copy.deepcopy(layout.check(model))]  # in a list: its parameters are not this module's
        self._library = native.load(_SOURCE)
        self._library.raysparse_scratch.restype = ctypes.c_int64
        self._row = 4 * self._library.raysparse_width()  # bytes of one feature of a chunk of sketches
        self._memory = Memory()
        self._kept: list[Tensor] = []  # what the kernel's pointers point at
        self._cost, self._weights = 0.0, 0  # of the GRU
        with torch.no_grad():
            self._pack()

    @torch.no_grad()
    def forward(
        self, x: Tensor, timesteps: Tensor, lengths: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """As `ChiroDiff.forward`, with its errors."""
        if self._cost > len(x) * self._weights + _CALLS:
            found: Tensor = self._model[0](x, timesteps, lengths, labels)
            return found
        lengths = layout.checked_points(lengths, x)
        with torch.autocast("cpu", enabled=False):
            start, tail, head = layout.sums(self._model[0], timesteps, labels)
        start = start * self._scales
        y = torch.zeros(x.shape)
        kept = (x.float().contiguous(), start, tail, y, lengths.argsort(descending=True, stable=True), lengths)
        sketches = layout.Sketches(*(tensor.data_ptr() for tensor in kept), *x.shape[:2])
        self._net.head.weights = head.data_ptr()
        threads = torch.get_num_threads()
        each = self._library.raysparse_scratch(ctypes.byref(self._net), ctypes.c_int64(x.shape[1]))
        memory = ctypes.c_void_p(self._memory.at_least(threads * each))  # 16 MB each at h = 96 and 165 points
        self._library.raysparse_predict(
            ctypes.byref(self._net), ctypes.byref(sketches), memory, ctypes.c_int32(threads)
        )
        return y

    def _pack(self) -> None:
        model = self._model[0]
        hidden, count, points = model.config.hidden, model.config.layers, layout.inputs_by_point(model)
        wide = max(2 * hidden, points)
        self._scales = layout.gate_scales().repeat(hidden)
        self._layers = (_Layer * count)()
        for layer in range(count):
            # Two places that layers read and write in turn: what one wrote the next reads, still in the cache.
            source, target = (wide, 0) if layer % 2 else (0, wide)
            inputs = 2 * hidden if layer else points
            self._layers[layer].source, self._layers[layer].inputs = source * self._row, inputs
            for side, end in enumerate(layout.SIDES):
                w_in, w_state, bias = layout.direction(model, layer, end)
                to = target + side * hidden
                before = to - source + (2 * wide if side else -2 * wide)
                places = (before * self._row, to * self._row)
                self._layers[layer].sides[side] = self._side(w_in[:, :inputs], w_state, bias * self._scales, *places)
        last = wide if count % 2 else 0
        head = layout.Head(None, hidden, points, model.out.out_features, last * self._row)
        self._net = _Net(self._layers, head, count, 2 * wide)

    def _side(self, w_in: Tensor, w_state: Tensor, bias: Tensor, before: int, to: int) -> layout.Side:
        used = w_in != 0, w_state != 0
        active = sum(int(mask.sum()) for mask in used)
        weights = w_in.numel() + w_state.numel()
        self._weights += weights
        if active >= weights * _DENSE:
            self._cost += _PER_DENSE * weights
            tiles = _tiles(w_in, w_state, self._library.raysparse_units())
            return layout.Side(None, None, *map(self._keep, (tiles, bias)), before, to, 1, 0)
        self._cost += _PER_ACTIVE * active
        inputs, columns = w_in.shape[1], w_in.shape[1] + w_state.shape[1]
        ends = _pass_ends(columns, active / weights, self._library.raysparse_features_in_cache())
        plans = [layout.plan(*used, before, self._row, *walked) for walked in itertools.pairwise((0, *ends))]
        counts, offsets, scale = (
            torch.cat([getattr(plan, name) for plan in plans]) for name in ("counts", "offsets", "scale")
        )
        values = torch.cat((w_in.flatten(), w_state.flatten()))[torch.cat([plan.active for plan in plans])] * scale
        pointers = map(self._keep, (counts, offsets, values, bias))
        return layout.Side(*pointers, before, to, len(ends), sum(end <= inputs for end in ends))

    def _keep(self, tensor: Tensor) -> int:
        """Its address, for as long as this module lives."""
        self._kept.append(tensor.contiguous())
        return self._kept[-1].data_ptr()


def _pass_ends(columns: int, density: float, fitting: int) -> list[int]:
    """Where the passes over the columns of a side end; fitting: columns that fit the first cache."""
    passes = 1 if density <= _ONE_PASS else math.ceil(columns / fitting)
    return [columns * (number + 1) // passes for number in range(passes)]


def _tiles(w_in: Tensor, w_state: Tensor, units: int) -> Tensor:
    """The weights of a dense side, block by block of `units` units: their inputs x (unit, gate), then their states'."""
    hidden, scales = w_state.shape[1], layout.gate_scales()
    parts = []
    for weights in (w_in, w_state):
        by_gate = weights.reshape(3, hidden, -1) * scales[:3, None, None]  # q has the scale of n
        padded = nn.functional.pad(by_gate, (0, 0, 0, -hidden % units))
        blocks = padded.reshape(3, -1, units, weights.shape[1])
        parts.append(blocks.permute(1, 3, 2, 0).flatten(1))
    return torch.cat(parts, 1)
