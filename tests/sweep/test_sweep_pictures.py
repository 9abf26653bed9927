"""A sweep of latents: pictures encoded on Ray before it, then trials of two DDP workers on what was encoded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raysparse import results as records
from raysparse import rng
from raysparse.space import Sweep
from raysparse.sweep import tuner

BASE: dict[str, Any] = {
    "data": {"name": "imagefolder", "options": {"size_px": 16, "flips": True, "validation_examples": 4}},
    "model": {
        "name": "latent_unet",
        "options": {
            "sample_size": 8,
            "block_out_channels": [8, 8],
            "attention_levels": [False, True],
            "layers_per_block": 1,
            "attention_head_dim": 8,
            "norm_num_groups": 4,
        },
    },
    "first_stage": {
        "options": {
            "block_out_channels": [8, 8],
            "attention_levels": [False, False],
            "layers_per_block": 1,
            "norm_num_groups": 4,
        }
    },
    "train": {"steps": 4, "batch_size": 8},
    "evaluate": {
        "extractor": "oriented_energy",
        "every_steps": 2,
        "generated": 16,
        "ddim_steps": 2,
        "batch_size": 8,
        "kid_subsets": 2,
        "kid_subset_size": 8,
    },
}


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_of_latents_on_two_workers(tmp_path: Path, sweep_of: Callable[..., Sweep], ray_home: Path) -> None:
    draw = rng.numpy_generator(0, "pictures of a sweep")
    (tmp_path / "pictures").mkdir()
    for number in range(24):
        Image.fromarray(draw.integers(0, 255, (16, 16, 3), np.uint8)).save(tmp_path / "pictures" / f"{number}.png")
    base = {**BASE, "data": {**BASE["data"], "source": str(tmp_path / "pictures"), "root": str(tmp_path / "data")}}
    grid = {"rigl": {"sparsity": [0.5], "update_interval": [2]}}
    sweep = sweep_of(base=base, search=None, grid=grid, asha=None, confirm=None, resources={"workers": 2})

    prepared = []
    tuner.prepare(sweep, progress=lambda done, total: prepared.append((done, total)), num_cpus=2, temp_dir=ray_home)
    assert prepared[-1][0] == prepared[-1][1] > 0
    (manifest,) = (tmp_path / "data").glob("imagefolder-*/manifest.json")
    stamp = manifest.stat().st_mtime_ns

    summary = tuner.run(sweep, tmp_path / "out", command="", num_cpus=2, temp_dir=ray_home)
    assert manifest.stat().st_mtime_ns == stamp  # encoded once
    assert [row.state for row in summary.board.rows.values()] == ["COMPLETED", "COMPLETED"]
    for row in summary.board.rows.values():
        table = records.read_trial(tmp_path / "out" / "records" / f"{row.trial_id}.parquet")
        assert table["world_size"].to_pylist() == [2, 2]
        assert all(value is not None for value in table["fid"].to_pylist())
