# mypy: disable-error-code="untyped-decorator, no-untyped-def"
"""Triton kernels of a weight [outputs, inputs] whose zeros lie in whole blocks, with activations.

Only `_cuda_products` imports this, when a layer needs it: triton comes with PyTorch for CUDA and may be absent.

x: [tokens, inputs], contiguous; y: [tokens, outputs] of the same type: float32, bfloat16 or float16. Sums are float32.
A program makes one tile of y. Compiled for compute capability 9.0 the product of blocks in 16 bits is wgmma with loads
ahead (cp.async), in float32 FMA.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# A tile's, by bytes of a number. In bfloat16 on an H200 64 and 256 were nowhere faster than 128; 128 in float32 are
# 448 kB of code, compiled in 14 s.
_BLOCK_TOKENS = {2: 128, 4: 32}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # where nothing can be compiled
_GRADIENT_TOKENS = {2: 64, 4: 32}  # read at a time
_PARTS = 264  # programs for a weight's gradient, about: two for each multiprocessor of an H200


class Blocks(NamedTuple):
    """Which blocks hold weights: of each row of blocks the columns."""

    columns: Tensor  # int32 [as many as there may be]
    starts: Tensor  # int32 [rows of blocks + 1]
    edge: int  # outputs, and inputs, of a block


def block(x: Tensor, values: Tensor, blocks: Blocks, bias: Tensor | None, *, gelu: bool, tf32: bool) -> Tensor:
    """values: [blocks, edge, edge], each block's transpose; gelu: of the result, exact."""
    return _product(x, values, (blocks.edge**2, 0, 0, blocks.edge), True, blocks, bias, gelu=gelu, tf32=tf32)


def block_of_weight(
    x: Tensor, weight: Tensor, blocks: Blocks, bias: Tensor | None, *, turned: bool, tf32: bool
) -> Tensor:
    """With a whole weight [O, I], contiguous, of which only the blocks are read: x W^T; turned: x W, blocks of W^T."""
    edge, row = blocks.edge, weight.shape[1]
    places = (0, edge, edge * row, row) if turned else (0, edge * row, edge, row)
    return _product(x, weight, places, turned, blocks, bias, gelu=False, tf32=tf32)


def _product(
    x: Tensor,
    values: Tensor,
    places: tuple[int, ...],
    by_input: bool,
    blocks: Blocks,
    bias: Tensor | None,
    *,
    gelu: bool,
    tf32: bool,
) -> Tensor:
    """places: how far apart values lie by the block's number, its row and its column, and in a block.

    by_input: so far apart there are inputs, and outputs lie together; else the other way round.
    """
    rows, tokens = len(blocks.starts) - 1, _BLOCK_TOKENS[x.element_size()]
    y = x.new_empty(len(x), rows * blocks.edge)
    _in_graphs(_block)[(triton.cdiv(len(x), tokens), rows)](
        *(x, values, blocks.columns, blocks.starts, values if bias is None else bias, y),
        *(*x.shape, rows * blocks.edge, *places),
        BIASED=bias is not None,
        GELU=gelu,
        BY_INPUT=by_input,
        TOKENS=tokens,
        EDGE=blocks.edge,
        PRECISION="tf32" if tf32 else "ieee",
        num_warps=8 if blocks.edge == 64 else 4,  # 3 to 5 % faster so, on an H200
        num_stages=2,  # as fast as 4
    )
    return y


def block_gradient(x: Tensor, dy: Tensor, rows: Tensor, blocks: Blocks, tf32: bool) -> Tensor:
    """dy^T x in the blocks, 0 elsewhere: float32 [outputs, inputs]. dy: [tokens, outputs], contiguous.

    rows: int32, like columns: a block's row. Sums are parts of the tokens added in order: the same bits each time.
    """
    edge, outputs, inputs = blocks.edge, dy.shape[1], x.shape[1]
    most, tokens = len(blocks.columns), _GRADIENT_TOKENS[x.element_size()]
    parts = max(1, min(triton.cdiv(len(x), 8 * tokens), 10 * _PARTS // most))
    each = triton.cdiv(triton.cdiv(len(x), parts), tokens) * tokens
    sums = x.new_empty(parts, most, edge, edge, dtype=torch.float32)
    given = (rows, blocks.columns, blocks.starts)
    last = len(blocks.starts) - 1
    _in_graphs(_block_sums)[(most, parts)](
        *(x, dy, *given, sums, *x.shape, outputs, last, most, each),
        EDGE=edge,
        TOKENS=tokens,
        PRECISION="tf32" if tf32 else "ieee",
        num_stages=3,
    )
    found = x.new_zeros(outputs, inputs, dtype=torch.float32)
    _in_graphs(_block_total)[(most,)](*(sums, *given, found, inputs, last, most, parts), EDGE=edge)
    return found


def _in_graphs(kernel: Any) -> Any:
    """The kernel, which PyTorch's compiler starts itself inside a `triton_op`."""
    return kernel if INTERPRETED else torch.library.wrap_triton(kernel)


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
    by_place,
    by_row,
    by_column,
    apart,
    BIASED: tl.constexpr,
    GELU: tl.constexpr,
    BY_INPUT: tl.constexpr,
    TOKENS: tl.constexpr,
    EDGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    inside = token < tokens
    along = tl.arange(0, EDGE)
    within = along[:, None] + along[None, :] * apart
    if BY_INPUT:
        within = along[:, None] * apart + along[None, :]
    total = tl.full((TOKENS, EDGE), 0.0, tl.float32)
    for place in range(tl.load(starts + row), tl.load(starts + row + 1)):
        column = tl.load(columns + place)
        part = tl.load(x + token * inputs + (column * EDGE + along)[None, :], mask=inside, other=0.0)
        weight = tl.load(values + place * by_place + row * by_row + column * by_column + within)
        total = tl.dot(part, weight, total, input_precision=PRECISION)
    output = row * EDGE + along[None, :]
    if BIASED:
        total += tl.load(bias + output).to(tl.float32)
    if GELU:
        total = 0.5 * total * (1 + tl.erf(total * 0.7071067811865476))
    tl.store(y + token * outputs + output, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _block_sums(
    x,
    dy,
    rows,
    columns,
    starts,
    sums,
    tokens,
    inputs,
    outputs,
    last,
    most,
    each,
    EDGE: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    place, part = tl.program_id(0), tl.program_id(1)
    if place < tl.load(starts + last):
        along = tl.arange(0, EDGE)
        output = tl.load(rows + place) * EDGE + along[None, :]
        into = tl.load(columns + place) * EDGE + along[None, :]
        total = tl.full((EDGE, EDGE), 0.0, tl.float32)
        for first in range(0, each, TOKENS):
            token = (part * each + first).to(tl.int64) + tl.arange(0, TOKENS)[:, None]
            inside = token < tokens
            given = tl.load(dy + token * outputs + output, mask=inside, other=0.0)
            read = tl.load(x + token * inputs + into, mask=inside, other=0.0)
            total = tl.dot(tl.trans(given), read, total, input_precision=PRECISION)
        within = along[:, None] * EDGE + along[None, :]
        tl.store(sums + (part * most + place).to(tl.int64) * EDGE * EDGE + within, total)


@triton.jit
def _block_total(
    sums,
    rows,
    columns,
    starts,
    found,
    inputs,
    last,
    most,
    parts,
    EDGE: tl.constexpr,
):
    place = tl.program_id(0)
    if place < tl.load(starts + last):
        along = tl.arange(0, EDGE)
        within = along[:, None] * EDGE + along[None, :]
        total = tl.full((EDGE, EDGE), 0.0, tl.float32)
        for part in range(parts):
            total += tl.load(sums + (part * most + place).to(tl.int64) * EDGE * EDGE + within)
        output, read = tl.load(rows + place) * EDGE + along[:, None], tl.load(columns + place) * EDGE + along[None, :]
        tl.store(found + output * inputs + read, total)
