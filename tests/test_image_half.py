"""The image half as a user has it: every method on pictures as pixels, and the whole latent path, by commands."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageDraw

from raysparse import cli, results, rng
from raysparse.train import restored

Command = Callable[..., str]
UNET = {
    "block_out_channels": [16, 16],
    "attention_levels": [False, True],
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
PIXELS = {
    "data": {"name": "hershey_pictures", "options": {"size_px": 16}},
    "model": {"name": "latent_unet", "options": {**UNET, "sample_size": 16}},
    "diffusion": NOISE,
    "optimizer": {"lr": 2.0e-3, "clip_norm": None},
    "train": {"steps": 60, "batch_size": 16},
    "evaluate": {
        "every_steps": 30,
        "extractor": "oriented_energy",  # glyph_cnn, made for black on white, is no judge of early coloured pictures
        "generated": 32,
        "references": 256,
        "ddim_steps": 4,
        "validation_examples": 256,
        "kid_subset_size": 30,
    },
}
METHODS = [("dense", None), *((method, s) for method in ("static", "magran", "rigl") for s in (0.5, 0.9))]


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> Command:
    """Runs a command line that must succeed; gives its stdout."""
    monkeypatch.setenv("RAYSPARSE_DATA", str(tmp_path_factory.getbasetemp() / "image-data"))

    def call(*words: object, fails: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["raysparse", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert (ended.value.code or 0) == fails, err
        return err if fails else out.strip()

    return call


@pytest.mark.slow
@pytest.mark.parametrize(("method", "sparsity"), METHODS)
def test_every_method_learns_from_pixels(command: Command, tmp_path: Path, method: str, sparsity: float | None) -> None:
    file = tmp_path / "trial.yaml"
    sparse = {"method": method} if sparsity is None else {"method": method, "sparsity": sparsity}
    if method in ("magran", "rigl"):
        sparse |= {"prune_ratio": 0.2, "update_interval": 10}
    file.write_text(yaml.safe_dump({**PIXELS, "sparse": sparse}))
    record = Path(command("train", file, "--output", tmp_path / "out", "--device", "cpu"))
    table = results.read_trial(record)
    first, last = results.reports_of(table)
    assert last.validation_loss < 0.5  # a network that says 0 has 1
    assert last.validation_loss < 0.6 * first.validation_loss
    # 60 steps are too few for FID to tell: at S = .9 it still rises then (oriented_energy 35.8 to 38.0, static).
    assert math.isfinite(last.fid)
    assert 1 - last.density == pytest.approx(sparsity or 0.0, abs=1e-4)
    assert (last.topology_updates, last.topology_changed > 0) == (
        (5, True) if method in ("magran", "rigl") else (0, False)
    )
    model = restored.load(tmp_path / "out")
    for name, mask in model.masks.items():
        assert not dict(model.model.named_parameters())[name][~mask].any()


def photographs(folder: Path, count: int) -> None:
    """Pictures of several sizes and kinds of file: coloured shapes on a gradient."""
    draw = rng.numpy_generator(0, "photographs")
    for number in range(count):
        width, height = draw.integers(64, 120, 2)
        ground = np.linspace(draw.integers(0, 99, 3), draw.integers(99, 255, 3), height)[:, None].repeat(width, 1)
        picture = Image.fromarray(ground.astype(np.uint8))
        for _ in range(3):
            x, y = draw.integers(0, 64, 2)
            ImageDraw.Draw(picture).ellipse((x, y, x + 30, y + 30), fill=tuple(draw.integers(0, 255, 3).tolist()))
        place = folder / "round" if number % 2 else folder / "oval"
        place.mkdir(parents=True, exist_ok=True)
        picture.save(place / f"{number:03d}.{'jpg' if number % 3 else 'png'}")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_home")
def test_the_whole_latent_path(command: Command, tmp_path: Path) -> None:
    """prepare on Ray, train, evaluate in several steps, sample, export, import: 64 pictures at 64 x 64."""
    photographs(tmp_path / "photographs", 72)
    (tmp_path / "photographs" / "oval" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    file = tmp_path / "trial.yaml"
    first_stage = {"options": {"block_out_channels": [8, 8, 16], "layers_per_block": 1, "norm_num_groups": 8}}
    trial = {
        **PIXELS,
        "data": {
            "name": "imagefolder",
            "source": str(tmp_path / "photographs"),
            "options": {
                "size_px": 64,
                "resize": "centre",
                "flips": True,
                "train_examples": 64,
                "validation_examples": 8,
            },
        },
        "model": {"name": "latent_unet", "options": {**UNET, "sample_size": 16}},
        "first_stage": first_stage,
        "sparse": {"method": "rigl", "sparsity": 0.5, "update_interval": 3},
        "train": {"steps": 12, "batch_size": 12},
        "evaluate": {"every_steps": 6, "generated": 24, "ddim_steps": 5, "kid_subset_size": 16, "batch_size": 12},
    }
    file.write_text(yaml.safe_dump(trial))
    prepared = json.loads(command("prepare", file, "--cpus", 2, "--json"))
    assert [found["id"] for found in prepared["damaged"]] == ["oval/broken.jpg"]
    folder = Path(prepared["folder"])
    stamp = (folder / "manifest.json").stat().st_mtime_ns

    out = tmp_path / "out"
    record = results.read_trial(Path(command("train", file, "--output", out, "--device", "cpu")))
    assert (folder / "manifest.json").stat().st_mtime_ns == stamp  # encoded once
    (*_, last) = results.reports_of(record)
    assert last.fid is not None

    study = json.loads(command("evaluate", out, "--ddim-steps", 4, "--ddim-steps", 5, "--device", "cpu", "--json"))
    assert [row["ddim_steps"] for row in study] == [4, 5]
    assert study[1]["fid"] == last.fid
    command("sample", out, "--output", tmp_path / "drawn", "--count", 4, "--device", "cpu")
    with Image.open(tmp_path / "drawn" / "00000.png") as picture:
        assert picture.size == (64, 64)

    checkpoint = restored.latest(out)
    command("export", checkpoint, "--to", tmp_path / "exported")
    command("import", tmp_path / "exported", "--to", tmp_path / "imported")
    before, after = restored.load(checkpoint), restored.load(tmp_path / "imported")
    for name, weight in before.model.state_dict().items():
        assert torch.equal(weight, after.model.state_dict()[name])
    for name, mask in before.masks.items():
        assert torch.equal(mask, after.masks[name])
    # An exported folder tells no one's paths, so the data is named again.
    data = tmp_path / "photographs"
    again = json.loads(command("evaluate", tmp_path / "imported", "--data", data, "--device", "cpu", "--json"))
    assert again[0]["fid"] == last.fid

    changed = tmp_path / "other.yaml"
    changed.write_text(yaml.safe_dump({**trial, "first_stage": {**first_stage, "sha256": "0" * 64}}))
    assert "first_stage.sha256" in command("train", changed, "--output", out, fails=2)
    shutil.rmtree(folder)
