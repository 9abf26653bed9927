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
# Where GELU's derivative is kept or read. 512 x 2,048 in bfloat16 on an H200, forward and back, took .165 and .200 ms
# with 128 tokens, .150 and .174 with 64, when the way back still computed the derivative; without GELU .080 and .075.
_GELU_TOKENS = {2: 64, 4: 32}
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
    return _product(x, weight, _places(weight, blocks, turned), turned, blocks, bias, gelu=False, tf32=tf32)


def into_gelu(x: Tensor, weight: Tensor, blocks: Blocks, bias: Tensor | None, tf32: bool) -> tuple[Tensor, Tensor]:
    """The exact GELU of x W^T + b, and its derivative there."""
    slopes = x.new_empty(len(x), len(weight))
    places = _places(weight, blocks, turned=False)
    return _product(x, weight, places, False, blocks, bias, gelu=True, tf32=tf32, slopes=slopes), slopes


def from_gelu(d_after: Tensor, weight: Tensor, blocks: Blocks, slopes: Tensor, tf32: bool) -> tuple[Tensor, Tensor]:
    """d_after W times the slopes, and that summed over the tokens: float32. blocks: of W^T."""
    sums = slopes.new_empty(
        triton.cdiv(len(d_after), _GELU_TOKENS[d_after.element_size()]), slopes.shape[1], dtype=torch.float32
    )
    places = _places(weight, blocks, turned=True)
    found = _product(d_after, weight, places, True, blocks, None, gelu=False, tf32=tf32, slopes=slopes, sums=sums)
    return found, sums.sum(0)


def _places(weight: Tensor, blocks: Blocks, turned: bool) -> tuple[int, ...]:
    edge, row = blocks.edge, weight.shape[1]
    return (0, edge, edge * row, row) if turned else (0, edge * row, edge, row)


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
    slopes: Tensor | None = None,
    sums: Tensor | None = None,
) -> Tensor:
    """places: how far apart values lie by the block's number, its row and its column, and in a block.

    by_input: so far apart there are inputs, and outputs lie together; else the other way round.
    slopes: takes gelu's derivative; or, with sums, holds it: the product is one with it, and each program puts its
    tokens' sum into sums.
    """
    x, rows = _in_memory(x), len(blocks.starts) - 1
    tokens = (_BLOCK_TOKENS if slopes is None else _GELU_TOKENS)[x.element_size()]
    y = x.new_empty(len(x), rows * blocks.edge)
    _in_graphs(_block)[(triton.cdiv(len(x), tokens), rows)](
        *(x, values, blocks.columns, blocks.starts, values if bias is None else bias, y),
        *(y if slopes is None else slopes, y if sums is None else sums),
        *(*x.shape, rows * blocks.edge, *places),
        BIASED=bias is not None,
        GELU=gelu,
        KEEP=gelu and slopes is not None,
        BACK=sums is not None,
        BY_INPUT=by_input,
        TOKENS=tokens,
        EDGE=blocks.edge,
        PRECISION="tf32" if tf32 else "ieee",
        num_warps=8 if blocks.edge == 64 and slopes is None else 4,  # 3 to 5 % faster so, on an H200
        num_stages=2,  # as fast as 4
    )
    return y


def block_gradient(x: Tensor, dy: Tensor, rows: Tensor, blocks: Blocks, tf32: bool) -> Tensor:
    """dy^T x in the blocks, 0 elsewhere: float32 [outputs, inputs]. dy: [tokens, outputs], contiguous.

    rows: int32, like columns: a block's row. Sums are parts of the tokens added in order: the same bits each time.
    """
    x, dy = _in_memory(x), _in_memory(dy)
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
    found = x.new_empty(outputs, inputs, dtype=torch.float32)
    _in_graphs(_block_total)[(last, inputs // edge)](*(sums, *given[1:], found, inputs, most, parts), EDGE=edge)
    return found


def _in_memory(x: Tensor) -> Tensor:
    """x itself, written before the kernels start.

    PyTorch's compiler computes what is not in memory yet anew for each kernel of ours that reads it, into another copy.
    """
    return x.as_strided(x.shape, x.stride())


def _in_graphs(kernel: Any) -> Any:
    """The kernel, which PyTorch's compiler starts itself inside a `triton_op`."""
    return kernel if INTERPRETED else torch.library.wrap_triton(kernel)


@triton.jit
def _normal(x):
    """Of a standard normal at x: how much lies below, to 1e-7, and the density times sqrt(2 pi).

    Abramowitz and Stegun 7.1.26, with the one exponential that both take: `erf` and `exp` took .5 ms more of a step of
    U-ViT small/2, of 24.6, with GELU in 26 of its products.
    """
    high = tl.exp(-0.5 * x * x)
    t = 1 / (1 + 0.23164188839 * tl.abs(x))  # .3275911 / sqrt(2)
    sum = 1.421413741 + t * (-1.453152027 + t * 1.061405429)
    tail = 0.5 * high * t * (0.254829592 + t * (-0.284496736 + t * sum))
    return tl.where(x < 0, tail, 1 - tail), high


@triton.jit
def _block(
    x,
    values,
    columns,
    starts,
    bias,
    y,
    slopes,
    sums,
    tokens,
    inputs,
    outputs,
    by_place,
    by_row,
    by_column,
    apart,
    BIASED: tl.constexpr,
    GELU: tl.constexpr,
    KEEP: tl.constexpr,
    BACK: tl.constexpr,
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
        below, high = _normal(total)
        if KEEP:
            slope = below + 0.3989422804014327 * total * high  # 1 / sqrt(2 pi)
            tl.store(slopes + token * outputs + output, slope.to(y.dtype.element_ty), mask=inside)
        total *= below
    if BACK:
        total *= tl.load(slopes + token * outputs + output, mask=inside, other=0.0).to(tl.float32)
        tl.store(sums + tl.program_id(0) * outputs + output, tl.sum(total, 0)[None, :])  # 0 beyond the tokens
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
    columns,
    starts,
    found,
    inputs,
    most,
    parts,
    EDGE: tl.constexpr,
):
    row, column = tl.program_id(0), tl.program_id(1)
    along = tl.arange(0, EDGE)
    within = along[:, None] * EDGE + along[None, :]
    total = tl.full((EDGE, EDGE), 0.0, tl.float32)
    for place in range(tl.load(starts + row), tl.load(starts + row + 1)):
        if tl.load(columns + place) == column:
            for part in range(parts):
                total += tl.load(sums + (part * most + place).to(tl.int64) * EDGE * EDGE + within)
    tl.store(found + (row * EDGE + along[:, None]) * inputs + column * EDGE + along[None, :], total)
