"""ChiroDiff's prediction on a CPU through a compiled kernel that skips the weights that are 0: for sampling.

What it computes is what `ChiroDiff.forward` computes, to rounding. Beside skipping zeros it leaves out what a point
need not repeat: the time features and the class are the same for all points of a sketch, so their part of the first
layer and of the output is computed once per sketch; and `mix` and `out`, with no activation between, are one product.
"""

from __future__ import annotations

import copy
import ctypes
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from raysparse import native
from raysparse.errors import UsageError
from raysparse.models.chirodiff import ChiroDiff

_SOURCE = Path(__file__).parent / "native" / "chirodiff.cpp"
_ALIGNMENT = 64  # bytes, of the widest vector
# A direction of a layer with at least this density is computed with all its weights. Measured at h = 48 to 256:
# skipping zeros takes 1.07 times as long at density 1, .95 times at .9 and .87 times at .75.
_DENSE = 0.95


class _Side(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("counts", "offsets", "values", "bias")),
        ("before", ctypes.c_int64),
        ("to", ctypes.c_int64),
    ]


class _LayerOf(ctypes.Structure):
    _fields_ = [("sides", _Side * 2), ("source", ctypes.c_int64), ("inputs", ctypes.c_int32)]


class _Net(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(_LayerOf)),
        ("head", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("layer_count", "hidden", "inputs", "outputs")),
        ("places", ctypes.c_int64),
        ("last", ctypes.c_int64),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "start", "tail", "y", "order", "lengths")),
        ("sketches", ctypes.c_int64),
        ("points", ctypes.c_int64),
    ]


class SparseChiroDiff(nn.Module):
    """A ChiroDiff as it is now, for sampling: same arguments, same prediction to rounding (1e-6), no gradients.

    The weights are copied: a change of the model's is not seen. A weight that is 0 takes no part, so one that is not
    finite spreads as in the model, but an input that is not finite is not multiplied with the zeros. Runs on
    torch.get_num_threads() threads; what comes out does not depend on how many. One call at a time.

    UsageError: a model that is not float32 on the CPU, or no compiler (see `native.load`).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if type(model) is not ChiroDiff or model._forward_pre_hooks or model._forward_hooks:
            raise UsageError(f"it takes a plain ChiroDiff, got {type(model).__name__} or one with hooks")
        parameter = model.mix.weight
        if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
            kind = f"{str(parameter.dtype).removeprefix('torch.')} on {parameter.device}"
            raise UsageError(f"it computes float32 on the CPU (--device cpu), the model is {kind}")
        self._library = native.load(_SOURCE)
        self._library.raysparse_scratch.restype = ctypes.c_int64
        self._row = 4 * self._library.raysparse_width()  # bytes of one feature of a chunk of sketches
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._model = [copy.deepcopy(model)]  # in a list: its parameters are not this module's
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            self._pack(model)

    def forward(
        self, x: Tensor, timesteps: Tensor, lengths: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """As `ChiroDiff.forward`, with its errors."""
        model, (sketches, points, _) = self._model[0], x.shape
        model._check_labels(labels)
        if lengths is None:
            lengths = torch.full((sketches,), points)
        lengths = lengths.contiguous()
        _check_lengths(lengths, sketches, points)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            by_sketch = model._time_features(timesteps)
            tail = torch.addmm(self._tail_bias, by_sketch, self._tail_weight.T)
            if labels is not None:
                by_sketch = torch.cat((by_sketch, model.labels(labels)), 1)
            start = torch.addmm(self._start_bias, by_sketch, self._start_weight.T)
            by_point = _by_point(x.float())
            y = torch.zeros_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
            order = lengths.argsort(descending=True, stable=True)
        kept = (by_point, start, tail, y, order, lengths)
        batch = _Batch(*(tensor.data_ptr() for tensor in kept), sketches, points)
        threads = torch.get_num_threads()
        self._library.raysparse_predict(
            ctypes.byref(self._net), ctypes.byref(batch), self._memory(threads, points), ctypes.c_int32(threads)
        )
        return y

    def _memory(self, threads: int, points: int) -> ctypes.c_void_p:
        """Scratch memory for so many threads, kept from call to call: 8 MB each at h = 96 and 165 points."""
        each = self._library.raysparse_scratch(ctypes.byref(self._net), ctypes.c_int64(points))
        if len(self._scratch) < threads * each + _ALIGNMENT:
            self._scratch = torch.empty(threads * each + _ALIGNMENT, dtype=torch.uint8)
        return ctypes.c_void_p(-(-self._scratch.data_ptr() // _ALIGNMENT) * _ALIGNMENT)

    def _pack(self, model: ChiroDiff) -> None:
        hidden, count = model.config.hidden, model.config.layers
        points = _points_of(model)
        wide = max(2 * hidden, points)
        self._kept: list[Tensor] = []  # what the kernel's pointers point at
        self._layers = (_LayerOf * count)()
        starts = []
        for number in range(count):
            # Two places that layers read and write in turn: what one wrote the next reads, still in the cache.
            source, target = (wide, 0) if number % 2 else (0, wide)
            inputs = 2 * hidden if number else points
            self._layers[number].source, self._layers[number].inputs = source * self._row, inputs
            for side, end in enumerate(("", "_reverse")):
                gates = _gates(model, f"l{number}{end}")
                if number == 0:
                    starts.append((gates.w_in[:, :, points:], gates.bias))
                    gates = gates._replace(w_in=gates.w_in[:, :, :points])
                to = target + side * hidden
                before = to - source + (2 * wide if side else -2 * wide)
                self._layers[number].sides[side] = self._side(gates, before * self._row, to * self._row)
        self._start_weight = torch.cat([_by_unit(weight).flatten(0, 1) for weight, _ in starts])
        self._start_bias = torch.cat([bias for _, bias in starts])
        mixed, timed = model.out.weight[:, :hidden], model.out.weight[:, hidden:]
        self._tail_weight, self._tail_bias = timed.clone(), model.out.bias + mixed @ model.mix.bias
        head = self._keep(mixed @ model.mix.weight)
        last = (wide if count % 2 else 0) * self._row
        self._net = _Net(self._layers, head, count, hidden, points, model.out.out_features, 2 * wide, last)

    def _side(self, gates: _Gates, before: int, to: int) -> _Side:
        active = int(gates.w_in.count_nonzero()) + int(gates.w_state.count_nonzero())
        bias = self._keep(gates.bias)
        if active >= _DENSE * (gates.w_in.numel() + gates.w_state.numel()):
            return _Side(None, None, self._keep(_tiles(gates, self._library.raysparse_units())), bias, before, to)
        return _Side(*map(self._keep, _shared(gates, before, self._row)), bias, before, to)

    def _keep(self, tensor: Tensor) -> int:
        """Its address, for as long as this module lives."""
        self._kept.append(tensor.contiguous())
        return self._kept[-1].data_ptr()


class _Gates(NamedTuple):
    """The weights of one direction of a layer as the kernel wants them scaled (see Side in gru.h)."""

    w_in: Tensor  # [3, h, inputs] of r, z, n
    w_state: Tensor  # [3, h, h] of r, z, q
    bias: Tensor  # [4 h] of r, z, n, q of each unit


def _gates(model: ChiroDiff, name: str) -> _Gates:
    w_in, w_state, b_in, b_state = (
        torch.stack(getattr(model.gru, f"{kind}_{name}").chunk(3))
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    scale = -math.log2(math.e) * torch.tensor([1.0, 1.0, 2.0])
    b_in, b_state = b_in * scale[:, None], b_state * scale[:, None]
    bias = torch.stack((b_in[0] + b_state[0], b_in[1] + b_state[1], b_in[2], b_state[2]), 1).flatten()
    return _Gates(w_in * scale[:, None, None], w_state * scale[:, None, None], bias)


def _shared(gates: _Gates, before: int, row: int) -> tuple[Tensor, Tensor, Tensor]:
    """Side's counts int32 [h, 14], offsets int32 and values float32 of a sparse side; row: bytes of a feature."""
    inputs = gates.w_in.shape[2]
    weights = torch.cat((gates.w_in, gates.w_state), 2).permute(1, 2, 0)  # [h, columns, 3]
    used_by = ((weights != 0) * torch.tensor([1, 2, 4])).sum(2)  # bits: r, z, n or q
    column = torch.arange(weights.shape[1])
    group = torch.where(used_by > 0, used_by - 1 + 7 * (column >= inputs), 14)  # 14: a column that no gate uses
    counts = nn.functional.one_hot(group, 15)[:, :, :14].sum(1)
    order = group.argsort(dim=1, stable=True)
    ordered = weights.gather(1, order[:, :, None].expand_as(weights))
    columns = order[group.gather(1, order) < 14]
    offsets = torch.where(columns < inputs, columns * row, (columns - inputs) * row + before)
    return counts.int(), offsets.int(), ordered[ordered != 0]


def _by_unit(w_in: Tensor) -> Tensor:
    """[3, h, n] of r, z, n -> [h, 4, n] with 0 for q."""
    return nn.functional.pad(w_in.transpose(0, 1), (0, 0, 0, 1))


def _tiles(gates: _Gates, units: int) -> Tensor:
    """The weights of a dense side, block by block of `units` units: their inputs x (unit, gate), then their states'."""
    hidden = gates.w_state.shape[1]
    parts = []
    for weights in (gates.w_in, gates.w_state):
        padded = nn.functional.pad(weights, (0, 0, 0, -hidden % units))
        blocks = padded.reshape(3, -1, units, weights.shape[2])
        parts.append(blocks.permute(1, 3, 2, 0).flatten(1))
    return torch.cat(parts, 1)


def _points_of(model: ChiroDiff) -> int:
    """Inputs of the first layer that differ from point to point: x, y, pen and the velocity; they come first."""
    width = model.gru.input_size - (model.out.in_features - model.config.hidden)
    return width if model.config.num_classes is None else width - model.config.label_features


def _by_point(x: Tensor) -> Tensor:
    """[B, L, 3] -> float32 [B, L, 5], contiguous."""
    velocity = nn.functional.pad(x[:, 1:, :2] - x[:, :-1, :2], (0, 0, 1, 0))
    return torch.cat((x, velocity), 2).contiguous()


def _check_lengths(lengths: Tensor, sketches: int, points: int) -> None:
    if lengths.shape != (sketches,) or int(lengths.min()) < 1 or int(lengths.max()) > points:
        raise ValueError(f"lengths must be {sketches} numbers in 1 .. {points}, got {lengths.tolist()}")
