"""A Ray of its own per test: own sockets, own token, never one that runs already."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
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


@pytest.fixture(scope="session")
def ray_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A short folder for Ray's sockets (107 bytes are allowed), and the environment that goes with it."""
    home = Path(tempfile.mkdtemp(prefix="rs", dir="/tmp"))
    token = home / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    root = str(Path(__file__).parents[2])  # `raysparse` for a driver that is started as a script
    changes = {
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAYSPARSE_DATA": str(tmp_path_factory.mktemp("data")),
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
    before = {name: os.environ.get(name) for name in [*changes, "RAY_ADDRESS"]}
    os.environ.update(changes)
    os.environ.pop("RAY_ADDRESS", None)
    yield home
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    shutil.rmtree(home, ignore_errors=True)
