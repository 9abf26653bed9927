"""ChiroDiff's prediction on a CPU through compiled kernels that skip the weights that are 0: for sampling.

What it computes is what `ChiroDiff.forward` computes, to rounding. Beside skipping zeros it leaves out what a point
need not repeat: the time features and the class are the same for all points of a sketch, so their part of the first
layer and of the output is computed once per sketch; and `mix` and `out`, with no activation between, are one product.
"""

from __future__ import annotations

import copy
import ctypes
from pathlib import Path

import torch
from torch import Tensor, nn

from raysparse import native
from raysparse.models import _cpu
from raysparse.models import _sparse_layout as layout
from raysparse.models._few_sketches import FewSketches
from raysparse.models._sparse_memory import Memory
from raysparse.models._sparse_sides import Packed
from raysparse.models.chirodiff import BY_POINT, ChiroDiff

_SOURCE = Path(__file__).parent / "native" / "chirodiff.cpp"
# A direction of a layer of at least this density is computed with all its weights. Times as long by skipping the zeros,
# h = 32 to 256, 64 sketches, on an Intel Xeon: 1.05 to 1.13 at density .9, .98 to 1.09 at .85, .95 to 1.03 at .8, .89
# to .94 at .7; on an AMD EPYC .89 to 1.1 at .99, .83 to 1.04 at .95, .83 to .99 at .9; with AVX2 .96 to 1.03 at .95,
# .92 at .9. With one or four sketches, on the Xeon, 1.08 to 1.21 at .8, 1.02 to 1.14 at .7, .98 to 1.11 at .6; on an
# EPYC 1.0 to 1.04 at .95, .98 to 1.03 at .9, .94 to .98 at .8 (AVX2 1.01 to 1.04, .99 to 1.0, .93 to .95). With
# sixteen, which fill one vector, on the Xeon 1.04 to 1.28 at .8, .91 to 1.19 at .7, .86 to 1.01 at .6; on an EPYC 1.05
# to 1.18 at .9, .89 to 1.0 at .7 (AVX2, eight: .93 to .99 at .95).
_DENSE = {"intel": 0.82, "amd": 0.97, "narrow": 0.95}[_cpu.KIND]
_DENSE_FEW = {"intel": 0.6, "amd": 0.87, "narrow": 0.87}[_cpu.KIND]
_DENSE_ONE = {"intel": 0.63, "amd": 0.78, "narrow": 0.95}[_cpu.KIND]  # of sketches that fill one vector
# By the lanes of a vector: where the GRU's density is at most so much, up to so many sketches are predicted one at a
# time. Times as long with a sketch in each lane on an AMD EPYC, h = 48 to 192, one thread, 16 lanes: 14 sketches .95 to
# 1.15 at density 1, 12 .97 to 1.15 at .5, 10 1.0 to 1.25 at .25 and .1, .87 to .95 at .05, where 9 are the most; 8
# lanes: 20 .95 to 1.12 at 1, 16 .94 to 1.03 at .75, 12 .99 to 1.07 at .5, 9 1.12 to 1.17 at .4, 6 .89 to 1.09 and 5
# 1.05 to 1.27 at .25, 4 1.02 to 1.18 at .1 and .05; 4 lanes: 5 1.57 to 1.64 at 1, 4 1.11 to 1.24 at .5, 3 1.09 to 1.13
# at .25, 2 .95 to 1.05 at .1 and .05. On the Xeon, 16 lanes, 16 are .86 to .98 at density 1, 14 .82 to .99 at .5, 12
# .91 to 1.03 at .25, 11 .81 to .97 at .1 and .05. PyTorch takes 2.8 to 30 times as long for one, 1.5 to 15 for eight
# and 1.3 to 12 for sixteen.
_FEW = {
    16: ((0.08, 9), (0.29, 10), (0.5, 11), (0.7, 12), (0.92, 13), (1.0, 14)),
    8: ((0.15, 4), (0.27, 5), (0.35, 7), (0.45, 9), (0.6, 12), (0.85, 16), (1.0, 19)),
    4: ((0.15, 2), (0.35, 3), (0.6, 4), (1.0, 5)),
}
_FEW_INTEL = _FEW | {16: ((0.18, 11), (0.35, 12), (0.55, 14), (1.0, 16))}


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

    The weights are copied: a change of the model's is not seen. A weight that is not finite spreads as in the model, an
    input that is not finite at least to what depends on it by weights that are not 0. Runs on torch.get_num_threads()
    threads; what comes out does not depend on how many. One call at a time.

    dense_from: the density from which on all weights of a direction of a layer are multiplied; None: as was measured.

    UsageError: no plain ChiroDiff of float32 on the CPU, or no compiler (see `native.load`).
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, dense_from: float | None = None) -> None:
        super().__init__()
        self._model = [copy.deepcopy(layout.check(model))]  # in a list: its parameters are not this module's
        self._library = native.load(_SOURCE)
        self._dense_from = dense_from
        self._memory = Memory()
        with torch.autocast("cpu", enabled=False):  # a bf16 trial makes this under autocast; the kernels read float32
            self._by_sketch = _scaled(layout.by_sketch(self._model[0]))
        self._most_one_by_one = _most_one_by_one(self._model[0], self._library.raysparse_lanes())
        self._kernels: dict[str, _ManySketches | FewSketches] = {}  # made when first used: 20 ms at h = 96

    @torch.no_grad()
    def forward(
        self, x: Tensor, timesteps: Tensor, lengths: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """As `ChiroDiff.forward`, with its errors."""
        lengths = layout.checked_points(lengths, x)
        with torch.autocast("cpu", enabled=False):
            start, tail = layout.sums(self._model[0], self._by_sketch, timesteps, labels)
            kernel = self._kernel(len(x))
        y = torch.zeros(x.shape)
        kept = (x.float().contiguous(), start, tail, y, lengths.argsort(descending=True, stable=True), lengths)
        sketches = layout.Sketches(*(tensor.data_ptr() for tensor in kept), *x.shape[:2])
        kernel.predict(sketches, self._memory, torch.get_num_threads())
        return y

    def _kernel(self, sketches: int) -> _ManySketches | FewSketches:
        lanes = self._library.raysparse_lanes()
        size = "few" if sketches <= self._most_one_by_one else "one vector" if sketches <= lanes else "many"
        if size not in self._kernels:
            rule = {"few": _DENSE_FEW, "one vector": _DENSE_ONE, "many": _DENSE}[size]
            packed = Packed(self._library, rule if self._dense_from is None else self._dense_from)
            kind = FewSketches if size == "few" else _ManySketches
            self._kernels[size] = kind(self._model[0], packed, self._by_sketch.head)
        return self._kernels[size]


class _ManySketches:
    """A sketch in each lane of the vectors; see native/chirodiff.cpp."""

    def __init__(self, model: ChiroDiff, packed: Packed, head: Tensor) -> None:
        self._library, self._packed = packed.library, packed
        self._library.raysparse_scratch.restype = ctypes.c_int64
        hidden, count = model.config.hidden, model.config.layers
        row, wide = packed.row, max(2 * hidden, BY_POINT)
        self._layers = (_Layer * count)()
        for layer in range(count):
            # Two places that layers read and write in turn: what one wrote the next reads, still in the cache.
            source, target = (wide, 0) if layer % 2 else (0, wide)
            inputs = 2 * hidden if layer else BY_POINT
            self._layers[layer].source, self._layers[layer].inputs = source * row, inputs
            for side, end in enumerate(layout.SIDES):
                w_in, w_state, bias = layout.direction(model, layer, end)
                to = target + side * hidden
                before = to - source + (2 * wide if side else -2 * wide)
                self._layers[layer].sides[side] = packed.side(w_in[:, :inputs], w_state, bias, before * row, to * row)
        last = wide if count % 2 else 0
        found = layout.Head.of(model, packed.keep(head), last * row)
        self._net = _Net(self._layers, found, count, 2 * wide)

    def predict(self, sketches: layout.Sketches, memory: Memory, threads: int) -> None:
        """Into what `sketches` points at."""
        each = self._library.raysparse_scratch(ctypes.byref(self._net), ctypes.c_int64(sketches.points))
        place = ctypes.c_void_p(memory.at_least(threads * each))  # 16 MB each at h = 96 and 165 points
        self._library.raysparse_predict(ctypes.byref(self._net), ctypes.byref(sketches), place, ctypes.c_int32(threads))


def _most_one_by_one(model: ChiroDiff, lanes: int) -> int:
    """Up to so many sketches are predicted one at a time."""
    weights = [weight for weight in model.gru.parameters() if weight.dim() == 2]
    density = sum(int(weight.count_nonzero()) for weight in weights) / sum(weight.numel() for weight in weights)
    return next(most for limit, most in (_FEW_INTEL if _cpu.INTEL else _FEW)[lanes] if density <= limit)


def _scaled(weights: layout.BySketch) -> layout.BySketch:
    """With the start as the kernels take it."""
    scales = layout.gate_scales().repeat(len(weights.start_bias) // 4)
    return weights._replace(start_bias=weights.start_bias * scales, start=weights.start * scales[:, None])
