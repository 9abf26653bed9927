"""The time steps of the packed GRU on a CPU with one compiled call for all that lies between their products."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raysparse import native
from raysparse.errors import UsageError
from raysparse.models._gru_products import LayerGradient, add_product, laid_out, project

if TYPE_CHECKING:
    from raysparse.models._packed_gru import Steps

_SOURCE = Path(__file__).parent / "native" / "packed_gru.cpp"
_POINTER, _COUNT = ctypes.c_void_p, ctypes.c_int64


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("bias", "states", "outside", "reverse")),
        *((name, _COUNT) for name in ("points", "hidden")),
    ]


def serves(x: Tensor) -> bool:
    """Whether a layer of x's type can run here: float32, and a C++ compiler is at hand."""
    return x.dtype == torch.float32 and _library() is not None


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        library = native.load(_SOURCE)
    except UsageError:
        return None
    library.raysparse_gates.argtypes = [_POINTER, _POINTER, *[_COUNT] * 4]
    library.raysparse_gates_back.argtypes = [*[_POINTER] * 3, *[_COUNT] * 4, _POINTER, _COUNT, *[_POINTER] * 2, _COUNT]
    library.raysparse_gates.restype = library.raysparse_gates_back.restype = None
    return library


def run(
    x: Tensor, w_ih: Tensor, w_hh: Tensor, bias: Tensor, steps: Steps, keep: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """x [points, in] -> output [points, 2 h], states [2, points, h] and, if kept, each chunk's gates [2, rows, 4 h]."""
    library, hidden, points = _library(), w_hh.shape[2], len(x)
    assert library is not None
    states, output, bias = x.new_empty(2, points, hidden), x.new_empty(points, 2 * hidden), bias.contiguous()
    layer = _layer(bias, states, output, steps)
    kept = []
    for begin, end in steps.chunks:
        rows = slice(steps.starts[begin], steps.starts[end])
        gates = x.new_empty(2, rows.stop - rows.start, 4 * hidden)
        gates[:, :, :hidden] = 0
        for side, part in enumerate((x[rows], x.index_select(0, steps.reverse[rows]))):
            project(part, w_ih[side], None, out=gates[side, :, hidden:])
        address, apart = gates.data_ptr(), gates.stride(0)
        for time in range(begin, end):
            last, first, size, at = _place(steps, time, rows.start)
            if time:
                add_product(gates[:, at : at + size, : 3 * hidden], states[:, last : last + size], w_hh)
            library.raysparse_gates(layer, address + 16 * at * hidden, apart, last, first, size)
        if keep:
            kept.append(gates)
    return output, states, kept


def run_back(
    grad: Tensor, w_hh: Tensor, states: Tensor, gates: list[Tensor], steps: Steps, total: LayerGradient
) -> None:
    """Add the gradients of the layer to `total`, from grad [points, 2 h], that of its output."""
    library, hidden = _library(), states.shape[2]
    assert library is not None
    grad, w_back = grad.contiguous(), laid_out(w_hh.transpose(1, 2))
    layer = _layer(None, states, grad, steps)
    carried = states.new_empty(2, 0, hidden)  # gradient of the states that the later time step read
    for (begin, end), chunk in zip(reversed(steps.chunks), reversed(gates), strict=True):
        rows = slice(steps.starts[begin], steps.starts[end])
        d_gates, before = torch.empty_like(chunk), chunk.new_empty(2, chunk.shape[1], hidden)
        for time in range(end - 1, begin - 1, -1):
            last, first, size, at = _place(steps, time, rows.start)
            passed = states.new_empty(2, size, hidden)
            library.raysparse_gates_back(
                layer,
                chunk.data_ptr() + 16 * at * hidden,
                d_gates.data_ptr() + 16 * at * hidden,
                chunk.stride(0),
                last,
                first,
                size,
                carried.data_ptr(),
                carried.shape[1],
                passed.data_ptr(),
                before.data_ptr() + 4 * at * hidden,
                before.stride(0),
            )
            carried = passed
            add_product(carried, d_gates[:, at : at + size, : 3 * hidden], w_back)
        total.add(rows, d_gates, before)


def _layer(bias: Tensor | None, states: Tensor, outside: Tensor, steps: Steps) -> object:
    """What the compiled calls of a layer share; the tensors must outlive it. bias: forward only."""
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in (bias, states, outside, steps.reverse))
    return ctypes.byref(_Layer(*pointers, states.shape[1], states.shape[2]))


def _place(steps: Steps, time: int, begin: int) -> tuple[int, int, int, int]:
    """A time step: the first row of the one before (-1: none), its own, how many it has, and its first in the chunk."""
    first = steps.starts[time]
    return steps.starts[time - 1] if time else -1, first, steps.sizes[time], first - begin
