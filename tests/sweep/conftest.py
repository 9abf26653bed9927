"""Sweeps small enough to run in seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from raysparse import space
from raysparse.space import Sweep

BASE: dict[str, Any] = {
    "data": {"name": "hershey", "train_examples": 64},
    "model": {"options": {"hidden": 8, "layers": 1}},
    "train": {"steps": 8, "batch_size": 8},
    "evaluate": {
        "extractor": "oriented_energy",
        "every_steps": 2,
        "generated": 16,
        "references": 32,
        "ddim_steps": 2,
        "batch_size": 16,
        "validation_examples": 128,
        "kid_subsets": 2,
        "kid_subset_size": 8,
        "grid": 4,
    },
}
SEARCH: dict[str, Any] = {
    "name": "tiny",
    "base": BASE,
    "search": {
        "trials": 6,
        "sampler": "random",
        "axes": {
            "dense": {},
            "static": {"sparsity": [0.5, 0.75, 0.9]},
            "rigl": {"sparsity": [0.5, 0.9], "prune_ratio": {"low": 0.05, "high": 0.5}, "update_interval": [2, 3]},
        },
        "seed_points": [{"method": "rigl", "sparsity": 0.5, "prune_ratio": 0.5}],
    },
    "asha": {"grace_steps": 2, "reduction_factor": 2},
    "confirm": {"seeds": [1]},
}


@pytest.fixture
def sweep_of() -> Callable[..., Sweep]:
    """The tiny search with changed sections; a section of None is left out."""

    def build(**changes: Any) -> Sweep:
        content = {name: value for name, value in (SEARCH | changes).items() if value is not None}
        return space.parse(content, "test")

    return build
