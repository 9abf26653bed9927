# mypy: disable-error-code="untyped-decorator, no-untyped-def"
"""Triton kernels of a weight [outputs, inputs] whose zeros lie in whole blocks or diagonals, with activations.

Only `_cuda_products` imports this, when a layer needs it: triton comes with PyTorch for CUDA and may be absent.

x: [tokens, inputs], contiguous; y: [tokens, outputs] of the same type: float32, bfloat16 or float16. Sums are float32.
A program makes one tile of y. No time has decided the sizes of tiles yet, as no GPU was at hand; compiled for compute
capability 9.0 the product of blocks in 16 bits is wgmma with loads ahead (cp.async), in float32 FMA.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK_TOKENS = {2: 128, 4: 32}  # a tile's, by bytes of a number; 128 in float32 are 448 kB of code, compiled in 14 s
_DIAGONAL_TOKENS, DIAGONAL_OUTPUTS = 32, 64


def block(
    x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, bias: Tensor | None, outputs: int, tf32: bool
) -> Tensor:
    """values: [blocks, B, B], each block's transpose, B 16, 32 or 64; columns: int32 [blocks], of blocks.

    starts: int32 [outputs / B + 1], the first block of each row of blocks.
    """
    y = x.new_empty(len(x), outputs)
    edge, tokens = values.shape[1], _BLOCK_TOKENS[x.element_size()]
    grid = (triton.cdiv(len(x), tokens), outputs // edge)
    _block[grid](
        *(x, values, columns, starts, values if bias is None else bias, y),
        *(*x.shape, outputs),
        BIASED=bias is not None,
        TOKENS=tokens,
        EDGE=edge,
        PRECISION="tf32" if tf32 else "ieee",
    )
    return y


def diagonal(x: Tensor, values: Tensor, shifts: Tensor, starts: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """For each tile of DIAGONAL_OUTPUTS outputs, the diagonals that meet it, from starts: int32 [tiles + 1] on.

    values: [diagonals over all tiles, DIAGONAL_OUTPUTS]; shifts: int32, from 0: output o reads input (o + shift) mod
    max(outputs, inputs), where there is one.
    """
    y = x.new_empty(len(x), outputs)
    grid = (triton.cdiv(len(x), _DIAGONAL_TOKENS), triton.cdiv(outputs, DIAGONAL_OUTPUTS))
    _diagonal[grid](
        *(x, values, shifts, starts, values if bias is None else bias, y),
        *(*x.shape, outputs, max(outputs, x.shape[1])),
        BIASED=bias is not None,
        TOKENS=_DIAGONAL_TOKENS,
        OUTPUTS=DIAGONAL_OUTPUTS,
    )
    return y


@triton.jit
def _block(
    x,
    values,
    columns,
    starts,
    bias,
    y,
    tokens,
    inputs,
    outputs,
    BIASED: tl.constexpr,
    TOKENS: tl.constexpr,
    EDGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    inside = token < tokens
    along = tl.arange(0, EDGE)
    total = tl.full((TOKENS, EDGE), 0.0, tl.float32)
    for place in range(tl.load(starts + row), tl.load(starts + row + 1)):
        column = tl.load(columns + place) * EDGE + along
        part = tl.load(x + token * inputs + column[None, :], mask=inside, other=0.0)
        weight = tl.load(values + place * EDGE * EDGE + along[:, None] * EDGE + along[None, :])
        total = tl.dot(part, weight, total, input_precision=PRECISION)
    output = row * EDGE + along[None, :]
    if BIASED:
        total += tl.load(bias + output).to(tl.float32)
    tl.store(y + token * outputs + output, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _diagonal(
    x,
    values,
    shifts,
    starts,
    bias,
    y,
    tokens,
    inputs,
    outputs,
    longer,
    BIASED: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    tile = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    inside = token < tokens
    along = tl.arange(0, OUTPUTS)[None, :]
    output = tile * OUTPUTS + along
    total = tl.full((TOKENS, OUTPUTS), 0.0, tl.float32)
    for place in range(tl.load(starts + tile), tl.load(starts + tile + 1)):
        read = output + tl.load(shifts + place)
        read = tl.where(read >= longer, read - longer, read)
        part = tl.load(x + token * inputs + read, mask=inside & (read < inputs), other=0.0)
        weight = tl.load(values + place * OUTPUTS + along)
        total += part.to(tl.float32) * weight.to(tl.float32)
    if BIASED:
        total += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)
    tl.store(y + token * outputs + output, total.to(y.dtype.element_ty), mask=inside & (output < outputs))
