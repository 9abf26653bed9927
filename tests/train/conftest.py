"""Trials small enough to train in a second."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysparse import config
from raysparse.config import TrialConfig
from raysparse.train import setup

TINY: dict[str, Any] = {
    "data": {"name": "hershey", "train_examples": 48},
    "model": {"name": "chirodiff", "options": {"hidden": 8, "layers": 1}},
    "optimizer": {"lr": 0.003},
    "train": {"steps": 12, "batch_size": 16, "ema_decay": 0.9},
    "evaluate": {
        "every_steps": 4,
        "extractor": "oriented_energy",
        "generated": 24,
        "references": 40,
        "ddim_steps": 3,
        "batch_size": 16,
        "validation_examples": 128,
        "kid_subsets": 4,
        "kid_subset_size": 16,
        "grid": 4,
    },
}
PICTURES: dict[str, Any] = {  # 16 x 16 pixels, a U-Net of 24 thousand parameters
    **TINY,
    "data": {"name": "hershey_pictures", "options": {"size_px": 16}, "train_examples": 48},
    "model": {
        "name": "latent_unet",
        "options": {
            "sample_size": 16,
            "block_out_channels": [8, 16],
            "attention_levels": [False, True],
            "layers_per_block": 1,
            "attention_head_dim": 8,
            "norm_num_groups": 4,
        },
    },
    "diffusion": {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195},
}
RIGL = {"sparse.method": "rigl", "sparse.sparsity": 0.5, "sparse.update_interval": 3}


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def tiny(data_root: Path) -> Callable[..., TrialConfig]:
    """tiny({"train.steps": 5}, ...) -> a prepared trial: TINY with values at dotted paths changed."""

    return functools.partial(_prepared, TINY, data_root)


@pytest.fixture(scope="session")
def pictures(data_root: Path) -> Callable[..., TrialConfig]:
    """The same of pictures as pixels: PICTURES with values at dotted paths changed."""
    return functools.partial(_prepared, PICTURES, data_root)


def _prepared(base: dict[str, Any], data_root: Path, *changes: dict[str, Any]) -> TrialConfig:
    content = config.with_value(base, "data.root", str(data_root))
    for change in changes:
        for path, value in change.items():
            content = config.with_value(content, path, value)
    trial = config.parse(content)
    setup.prepare_data(trial)
    return trial


@pytest.fixture(scope="session")
def rigl() -> dict[str, Any]:
    return RIGL
