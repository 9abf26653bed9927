"""bfloat16 on a CPU whose vectors multiply pairs of it: two inputs beside each other, times two weights, in one number.

A pair is worked on where one of its weights is left: at S = .5 .75 as many as there are weights, at .9 .95; by blocks
half as many. What comes out is in bfloat16 too, as under autocast: PyTorch's GELU takes four times as long in float32.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from raysparse import native
from raysparse.models import _cpu

SOURCE = Path(__file__).parent / "native" / "products.cpp"


def used(weight: Tensor) -> bool:
    """Whether a layer made here of a weight [O, I, ...] is computed so: under autocast, if CPU and compiler can, both
    even. UsageError: no compiler."""
    outputs, inputs = weight.shape[:2]
    if not (_cpu.PAIRS and _cpu.halved() and outputs % 2 == inputs % 2 == 0):
        return False
    return bool(native.load(SOURCE).raysparse_pairs())


def of_weight(weight: Tensor) -> Tensor:
    """[O, I, ...] -> [O, pairs, 2]: inputs or channels 2 j and 2 j + 1 at each place of the window."""
    outputs, inputs = weight.shape[:2]
    return weight.reshape(outputs, inputs // 2, 2, -1).movedim(2, 3).reshape(outputs, -1, 2)


def of_features(x: Tensor) -> Tensor:
    """[..., I] of floats -> [..., I / 2] of pairs, in float32's bits."""
    return x.bfloat16().contiguous().view(torch.float32)


def of_channels(x: Tensor) -> Tensor:
    """[B, C, H, W] of floats -> [B, C / 2, H, W]."""
    x = x.bfloat16()
    return torch.stack((x[:, 0::2], x[:, 1::2]), -1).view(torch.float32).squeeze(-1)
