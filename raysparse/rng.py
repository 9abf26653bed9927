"""Random numbers that are a function of (seed, purpose, rank, step): nothing draws from a global generator.

So a draw needs no saved generator state: a resumed run makes the same draws because it asks for the same key.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


def key(seed: int, purpose: str, *, rank: int = 0, step: int = 0) -> int:
    """A 63-bit seed for one draw; any change of any argument gives an unrelated one."""
    text = f"{seed}/{purpose}/{rank}/{step}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, *, rank: int = 0, step: int = 0, device: str = "cpu") -> torch.Generator:
    """A fresh torch generator on `device` for one draw."""
    import torch

    return torch.Generator(device=device).manual_seed(key(seed, purpose, rank=rank, step=step))


def uniform(
    seed: int, purpose: str, shape: Sequence[int], *, step: int = 0, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """float32 of that shape, in [0, 1), made on the device: the same numbers on all of them.

    The upper 24 bits of SplitMix64 (Steele, Lea and Flood 2014, with Stafford's mix 13) from `key`. torch.rand takes a
    CPU 3.5 ns a number; what it draws on CUDA depends on how many multiprocessors the GPU has.
    """
    import torch

    z = torch.arange(1, math.prod(shape) + 1, dtype=torch.int64, device=device).mul_(_signed(0x9E3779B97F4A7C15))
    z.add_(key(seed, purpose, step=step))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z.bitwise_xor_(_shifted(z, shift)).mul_(_signed(factor))
    return _shifted(z, 40).float().mul_(2.0**-24).view(*shape)


def _shifted(z: torch.Tensor, by: int) -> torch.Tensor:
    """To the right, with zeros from the left; torch's own copies the sign."""
    return z.bitwise_right_shift(by).bitwise_and_((1 << (64 - by)) - 1)


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits


def numpy_generator(seed: int, purpose: str, *, rank: int = 0, step: int = 0) -> np.random.Generator:
    """The same for numpy."""
    import numpy as np

    return np.random.default_rng(key(seed, purpose, rank=rank, step=step))
