"""The products of the packed GRU on a CPU, each by the library that is faster on this machine."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from raysparse.models._cpu import AVX512, INTEL

# MKL uses AVX-512 on Intel alone. There it is faster than oneDNN: whole training steps by 1.4 to 1.6 (h=128 to 48). On
# AMD oneDNN's large products are 1.5 to 2.2 times as fast; with AVX2 it gains nothing. PyTorch offers oneDNN for
# float32 only through the operator that its compiler emits.
ONEDNN = not INTEL and AVX512 and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_ONEDNN_PRODUCTS = (
    1_500_000  # of a time step and direction, on AMD: MKL won at 0.9 million, oneDNN at 2 million (h=128)
)


def laid_out(weight: Tensor) -> Tensor:
    """weight [2, outputs, in], in memory as the products below are fastest: for MKL its transpose is contiguous."""
    return weight.contiguous() if _onednn(weight) else weight.transpose(1, 2).contiguous().transpose(1, 2)


def project(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out [rows, outputs] = x [rows, in] weight^T + bias; out's rows may be apart."""
    if _onednn(x):
        out.copy_(_linear(x, weight, bias))
    elif bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)


def add_product(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """out [2, rows, outputs] += x [2, rows, in] weight^T; weight: [2, outputs, in]."""
    if _onednn(x) and x.shape[1] * weight[0].numel() >= _ONEDNN_PRODUCTS:
        for side in (0, 1):
            out[side].add_(_linear(x[side], weight[side]))
    else:
        out.baddbmm_(x, weight.transpose(1, 2))


def add_weight_gradient(out: Tensor, grad: Tensor, x: Tensor) -> None:
    """out [in, outputs] += x^T grad; grad: [rows, outputs], x: [rows, in].

    oneDNN takes its first operand contiguous: transposing x, not the wider grad, saves up to two thirds of the time
    (h=128: 0.52 for 1.46 ms). The second it takes transposed, but with gaps between the rows is 200 times slower.
    """
    if _onednn(x):
        out.add_(_linear(x.T, grad.contiguous().T))
    else:
        out.addmm_(x.T, grad)


def _onednn(x: Tensor) -> bool:
    return ONEDNN and x.dtype == torch.float32


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [rows, in] -> x weight^T + bias, by oneDNN."""
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))


class LayerGradient:
    """The gradients of a bidirectional layer, summed chunk by chunk."""

    def __init__(self, x: Tensor, w_ih: Tensor, w_hh: Tensor, reverse: Tensor, *, needs_x: bool) -> None:
        """x: [points, in]; w_ih [2, 3 h, in], w_hh [2, 3 h, h]; reverse: int64 [points], see `Steps`."""
        self._x, self._reverse, self._hidden = x, reverse, w_hh.shape[2]
        self._w_in = laid_out(w_ih.transpose(1, 2))
        self._d_x = x.new_empty(2, *x.shape) if needs_x else None  # of each direction, in its own order
        self._d_w_ih = x.new_zeros(2, w_ih.shape[2], w_ih.shape[1])
        self._d_w_hh = x.new_zeros(2, w_hh.shape[2], w_hh.shape[1])
        self._d_bias = x.new_zeros(2, 4 * self._hidden)

    def add(self, rows: slice, d_gates: Tensor, before: Tensor) -> None:
        """d_gates [2, rows, 4 h] of q, r, z, n before activation; before [2, rows, h]: the states they came from."""
        hidden = self._hidden
        for side, part in enumerate((self._x[rows], self._x.index_select(0, self._reverse[rows]))):
            d_in = d_gates[side, :, hidden:]
            add_weight_gradient(self._d_w_ih[side], d_in, part)
            add_weight_gradient(self._d_w_hh[side], d_gates[side, :, : 3 * hidden], before[side])
            if self._d_x is not None:
                project(d_in, self._w_in[side], None, out=self._d_x[side, rows])
        self._d_bias += d_gates.sum(1)

    def sums(self) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """Of x [points, in], W_ih, W_hh (q first) and the biases [2, 4 h]. Once only."""
        both = None if self._d_x is None else self._d_x[0].add_(self._d_x[1].index_select(0, self._reverse))
        return both, self._d_w_ih.transpose(1, 2), self._d_w_hh.transpose(1, 2), self._d_bias
