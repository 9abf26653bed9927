"""SparseDM's sweep files, each trained for real at a small size: the dense teacher first, then 2:4 from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from trainer_state import tensors_of

from raysparse import config, plugins, space
from raysparse.models import autoencoder
from raysparse.results import read_trial, reports_of
from raysparse.train import run

SPACES = Path(__file__).resolve().parents[2] / "tune_spaces"
SMALL = {
    "optimizer.warmup_steps": 1,
    "train.steps": 4,
    "train.batch_size": 8,
    "evaluate.every_steps": 4,
    "evaluate.extractor": "oriented_energy",
    "evaluate.generated": 8,
    "evaluate.references": 8,
    "evaluate.ddim_steps": 2,
    "evaluate.batch_size": 8,
    "evaluate.kid_subsets": 2,
    "evaluate.kid_subset_size": 4,
    "evaluate.grid": 0,
}
ALL = {"train_examples": None, "validation_examples": None, "reference_examples": None}
SIZES = {
    "cifar10": ALL,
    "celeba64": ALL,
    "imagenet": {**ALL, "conditional": True, "size_px": 16, "classes": 2},
}
NETWORK = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def small(name, method, data_root, tmp_path, **point):
    """A trial of a sweep file, made small, on the pictures that its data set's own file makes for tests."""
    sweep = space.load(SPACES / f"sparsedm_{name}.yaml")
    content = json.loads(space.trial(sweep, {"method": method, **point}).dump_json())
    source = tmp_path / "source"
    if not source.is_dir():
        source.mkdir()
        plugins.load("datasets", content["data"]["name"]).tiny_source(source)
    options = {**content["model"]["options"], **NETWORK}
    changes = {**SMALL, "data.root": str(data_root), "data.source": str(source), "data.options": SIZES[name]}
    if name == "imagenet":
        changes["first_stage"] = {"name": "autoencoder", "options": autoencoder.SMALL}  # f = 2, 3 channels
        options |= {"in_channels": 3, "sample_size": 8, "num_classes": 2}
    for path, value in {**changes, "model.options": options}.items():
        content = config.with_value(content, path, value)
    return content


@pytest.mark.parametrize(
    "name",
    ["cifar10", pytest.param("celeba64", marks=pytest.mark.slow), pytest.param("imagenet", marks=pytest.mark.slow)],
)
def test_from_a_dense_network_to_exact_2_of_4(data_root, tmp_path, name):
    dense = config.parse(small(name, "dense", data_root, tmp_path))
    assert run.train(dense, tmp_path / "dense", device="cpu").state == "COMPLETED"
    content = small(name, "nm_ste", data_root, tmp_path, loss="both")
    content["sparse"] |= {"teacher": str(tmp_path / "dense"), "stages": "progressive", "stage_steps": 1}
    content["train"] |= {"steps": 8}
    trial = config.parse(content)
    assert (trial.sparse.setting("sr_lambda"), trial.sparse.setting("teacher_weight")) == (2e-4, 0.1)
    assert run.train(trial, tmp_path / "out", device="cpu").state == "COMPLETED"
    report = reports_of(read_trial(tmp_path / "out" / "records" / f"{trial.trial_id}.parquet"))[-1]
    assert report.density == 0.5
    found = tensors_of(tmp_path / "out" / "checkpoints" / trial.trial_id / "step-000000008")
    sparse = [
        key for key in found if key.startswith(("weights/", "ema/")) and key.endswith((".qkv.weight", ".fc2.weight"))
    ]
    assert len(sparse) == 12
    for key in sparse:
        assert (found[key].reshape(-1, 4).count_nonzero(1) == 2).all()
    for key in ("weights/weights.late.0.skip.weight", "ema/ema.decoder.weight", "ema/ema.patch_embed.weight"):
        assert (found[key] != 0).float().mean() > 0.99
