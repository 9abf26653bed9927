"""A few made-up drawings, which `tiny_source` of each data set writes in that set's format to show and test it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raysparse import rng


def doodles(n: int, seed: int = 0) -> list[list[NDArray[np.float64]]]:
    """n drawings of one to four arcs each: strokes float64 [points, 2] in about [0, 250], y downwards."""
    generator = rng.numpy_generator(seed, "doodles")
    return [[_arc(generator) for _ in range(generator.integers(1, 5))] for _ in range(n)]


def _arc(generator: np.random.Generator) -> NDArray[np.float64]:
    centre, radius = generator.uniform(60, 190, 2), generator.uniform(10, 60, 2)
    angles = generator.uniform(0, 7) + np.linspace(0, generator.uniform(1, 6), generator.integers(3, 40))
    points: NDArray[np.float64] = centre + radius * np.column_stack([np.cos(angles), np.sin(angles)])
    return points
