"""Which examples make up a batch: a pure function of the step, so that a resumed run reads on where it stopped."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raysparse import rng


def batch_indices(
    n: int, batch_size: int, seed: int, step: int, rank: int = 0, world_size: int = 1
) -> NDArray[np.int64]:
    """The examples of one rank's share of batch `step`: int64 [batch_size / world_size] in [0, n).

    The stream of examples is one permutation of all n per epoch, end to end, each drawn from (seed, epoch). Batch k is
    positions k * batch_size ... (k + 1) * batch_size of the stream, so no example is left out and a batch may span two
    epochs. batch_size counts over all ranks; rank r has the r-th contiguous share, so the global batch is the same for
    any world size. ValueError for sizes that cannot be.
    """
    if n < 1 or batch_size < 1 or step < 0:
        raise ValueError(f"need n >= 1, batch_size >= 1 and step >= 0; got {n}, {batch_size} and {step}")
    if batch_size % world_size or not 0 <= rank < world_size:
        raise ValueError(
            f"batch size {batch_size} must divide by the {world_size} ranks, and rank {rank} be one of them"
        )
    share = batch_size // world_size
    positions = np.arange(share) + step * batch_size + rank * share
    epochs, places = np.divmod(positions, n)
    indices = np.empty(share, np.int64)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        indices[inside] = _permutation(n, seed, int(epoch))[places[inside]]
    return indices


_latest: dict[tuple[int, int], tuple[int, NDArray[np.int64]]] = {}


def _permutation(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of one epoch. The latest of each (n, seed) is remembered: drawing it takes 4 ms at 300,000 examples."""
    held = _latest.get((n, seed))
    if held is None or held[0] != epoch:
        if len(_latest) >= 8:
            _latest.clear()
        held = (epoch, rng.numpy_generator(seed, "epoch order", step=epoch).permutation(n))
        _latest[n, seed] = held
    return held[1]
