"""Random numbers that are a function of (seed, purpose, rank, step): nothing draws from a global generator.

So a draw needs no saved generator state: a resumed run makes the same draws because it asks for the same key.
"""

from __future__ import annotations

import hashlib
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


def numpy_generator(seed: int, purpose: str, *, rank: int = 0, step: int = 0) -> np.random.Generator:
    """The same for numpy."""
    import numpy as np

    return np.random.default_rng(key(seed, purpose, rank=rank, step=step))
