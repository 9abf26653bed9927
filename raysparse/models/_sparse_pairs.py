"""bfloat16 on a CPU whose vectors multiply pairs of it: two inputs beside each other, times two weights, in one number.

A pair is worked on where one of its weights is left: at S = .5 .75 as many as there are weights, at .9 .95; by blocks
half as many. With AMX blocks of 16 x 16 are multiplied at once, those in which a weight is left (native/blocks.h). What
comes out is in bfloat16 too, as under autocast: PyTorch's GELU takes four times as long in float32.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from raysparse import native
from raysparse.models import _cpu

SOURCE = Path(__file__).parent / "native" / "products.cpp"
_SIDE = 16  # of a block


def used(weight: Tensor) -> bool:
    """Whether a layer made here of a weight [O, I, ...] is computed so: under autocast, if CPU and compiler can, both
    even. UsageError: no compiler."""
    outputs, inputs = weight.shape[:2]
    if not (_cpu.PAIRS and _cpu.halved() and outputs % 2 == inputs % 2 == 0):
        return False
    return bool(native.load(SOURCE).raysparse_pairs())


def in_blocks(weight: Tensor) -> bool:
    """Whether a layer made here of a weight [O, I, ...] can be computed in blocks, by AMX: under autocast, O and I by
    sixteens. UsageError: no compiler."""
    outputs, inputs = weight.shape[:2]
    if not _cpu.halved() or outputs % _SIDE or inputs % _SIDE:
        return False
    return bool(native.load(SOURCE).raysparse_blocks())


def whole_blocks(mask: Tensor) -> Tensor:
    """bool [O, I, ...] -> the same with all of each block, of 16 outputs x 16 inputs or, in a convolution, x a pair of
    them, that it has a weight of."""
    outputs, inputs, *window = mask.shape
    side = 2 if window else _SIDE
    blocks = mask.view(outputs // _SIDE, _SIDE, inputs // side, side, *window)
    return blocks.any(1, keepdim=True).any(3, keepdim=True).expand_as(blocks).reshape(mask.shape)


def of_features(x: Tensor) -> Tensor:
    """[..., I] of floats -> the same in bfloat16, contiguous: where it begins a pair does. No view in float32: one is
    refused of the tokens of an image of one pixel, whose strides are odd."""
    x = x.bfloat16().contiguous()
    return x.clone() if x.data_ptr() % 4 else x


class _Images(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("planes", "height", "width", "up", "side")]


def of_channels(library: ctypes.CDLL, x: Tensor, padding: tuple[int, ...]) -> Tensor:
    """[B, C, H, W] of floats or bfloat16 -> [B, C / 2, H, W] of pairs, padded: above and below, to each side.

    library: that of SOURCE, which takes a quarter of PyTorch's time for it, a tenth of a 3x3 convolution at S = .9.
    """
    up, side = (max(by, 0) for by in padding)
    if min(padding) < 0:  # what a wide padding added is left out of dx
        x = F.pad(x, (padding[1] - side,) * 2 + (padding[0] - up,) * 2)
    x = (x if x.dtype == torch.bfloat16 else x.float()).contiguous()
    count, channels, height, width = x.shape
    found = x.new_empty(count, channels // 2, height + 2 * up, width + 2 * side, dtype=torch.float32)
    library.raysparse_pair_images(
        *(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.dtype == torch.bfloat16)),
        *(ctypes.c_void_p(found.data_ptr()), ctypes.byref(_Images(count * channels // 2, height, width, up, side))),
        ctypes.c_int32(torch.get_num_threads()),
    )
    return found
