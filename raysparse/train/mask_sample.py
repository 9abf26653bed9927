"""A sample of the masks for the record, so that overlaps between seeds and over time can be told without the masks.

The positions are the same in every trial of a model: golden-ratio steps through all maskable weights, which are even
and need no random numbers. 4,096 bits are half a kilobyte a report; at S = .9 some 410 of them
are active, so that an overlap of one half has a standard error of 2.5 %.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

POSITIONS = 4096
GOLDEN = 11400714819323198485  # 2^64 / golden ratio, odd


def sample(masks: Mapping[str, Tensor]) -> str | None:
    """JSON {parameter name: bits in hex}, a layer's bits in the order of its flattened mask; None without masks.

    A layer gets as many positions as its share of all weights says, some small ones none: these are left out. The last
    byte of a layer is filled up with zeros.
    """
    sizes = tuple(mask.numel() for mask in masks.values())
    if not sum(sizes):
        return None
    found = {}
    for (name, mask), places in zip(masks.items(), positions(sizes), strict=True):
        if len(places):
            index = torch.from_numpy(places).to(mask.device)
            bits = mask.reshape(-1)[index].cpu().numpy()
            found[name] = np.packbits(bits).tobytes().hex()
    return json.dumps(found)


@functools.lru_cache(maxsize=8)
def positions(sizes: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """int64 positions in each of the layers of these sizes, ascending; all of them where the layers are small."""
    total = sum(sizes)
    if total <= POSITIONS:
        chosen = np.arange(total, dtype=np.int64)
    else:
        found: set[int] = set()
        for k in itertools.count():
            found.add((k * GOLDEN % 2**64) * total >> 64)
            if len(found) == POSITIONS:
                break
        chosen = np.array(sorted(found), dtype=np.int64)
    ends = np.cumsum((0, *sizes))
    cuts = np.searchsorted(chosen, ends)
    return tuple(chosen[a:b] - start for a, b, start in zip(cuts, cuts[1:], ends, strict=False))
