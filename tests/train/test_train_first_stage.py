from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raysparse import rng
from raysparse.config import FirstStageConfig
from raysparse.errors import UsageError
from raysparse.models import autoencoder
from raysparse.train import first_stage
from raysparse.train.first_stage import FirstStage

OPTIONS = autoencoder.SMALL
RANDOM = FirstStageConfig(options=OPTIONS)


def pictures(count: int = 5) -> Tensor:
    return torch.randint(0, 256, (count, 3, 16, 16), generator=rng.generator(0, "pictures"), dtype=torch.uint8)


def saved(folder: Path, seed: int) -> autoencoder.Autoencoder:
    model = autoencoder.build(autoencoder.Config(**OPTIONS), seed=seed)
    model.vq.save_pretrained(folder)
    return model


def test_encoding_and_decoding_are_the_networks_own() -> None:
    stage = FirstStage.of(RANDOM, batch_size=2)
    model = autoencoder.build(autoencoder.Config(**OPTIONS), seed=0)
    assert stage.identity == autoencoder.identity(model)
    images = pictures()
    latents = stage(images)
    assert latents.dtype == torch.float16
    assert latents.shape == (5, *stage.latent_shape(16)) == (5, 3, 8, 8)
    assert not latents.requires_grad
    expected = model.encode(images.float() / 127.5 - 1)
    torch.testing.assert_close(latents.float(), expected, rtol=1e-3, atol=1e-4)
    drawn = stage.decode(latents.float())
    assert drawn.dtype == torch.uint8
    assert drawn.shape == images.shape
    exact = ((model.decode(latents.float()) + 1) * 127.5).clamp(0, 255)
    assert (drawn.float() - exact).abs().max() <= 0.51


def test_pixels_are_rounded_and_clamped(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = FirstStage.of(RANDOM)
    values = torch.tensor([-9.0, -1.0, -0.004, 0.0, 0.9999, 7.0, torch.nan, torch.inf]).view(1, 1, 2, 4)
    monkeypatch.setattr(autoencoder.Autoencoder, "decode", lambda self, z: values.expand(1, 3, 2, 4))
    drawn = stage.decode(torch.zeros(1, 3, 1, 2))
    assert drawn[0, 0].flatten().tolist() == [0, 0, 127, 128, 255, 255, 128, 128]


def test_latents_that_are_not_finite_decode_as_zeros() -> None:
    stage = FirstStage.of(RANDOM)
    z = torch.zeros(1, 3, 4, 4)
    bad = z.clone()
    bad[0, 0, 0, 0], bad[0, 1, 0, 0], bad[0, 2, 0, 0] = torch.nan, torch.inf, -torch.inf
    assert torch.equal(stage.decode(bad), stage.decode(z))


def test_the_batch_does_not_matter() -> None:
    whole, single = FirstStage.of(RANDOM), FirstStage.of(RANDOM, batch_size=1)
    images = pictures()
    torch.testing.assert_close(whole(images).float(), single(images).float(), rtol=0, atol=2e-3)


def test_the_callers_autocast_does_not_reach_it() -> None:
    stage, images = FirstStage.of(RANDOM), pictures()
    latents = stage(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(stage(images), latents)
        inside = stage.decode(latents)
    assert torch.equal(inside, stage.decode(latents))


@pytest.mark.parametrize("factor", [1e6, torch.nan])
def test_latents_that_16_bits_cannot_hold_are_refused(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = FirstStage.of(RANDOM)
    encode = autoencoder.Autoencoder.encode
    monkeypatch.setattr(autoencoder.Autoencoder, "encode", lambda self, x: encode(self, x) * factor)
    with pytest.raises(UsageError, match="16 bits cannot hold"):
        stage(pictures())


@pytest.mark.slow
def test_it_travels_and_reads_its_weights_where_it_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "vq", seed=3)
    monkeypatch.chdir(tmp_path)
    stage = FirstStage.of(FirstStageConfig(weights="vq", options=OPTIONS))
    packed = pickle.dumps(stage)
    assert len(packed) < 2000
    images, expected = pictures(1), stage(pictures(1))
    (tmp_path / "stage.pickle").write_bytes(packed)
    torch.save({"images": images}, tmp_path / "images.pt")
    code = (
        "import pickle, sys, torch\n"
        f"stage = pickle.load(open({str(tmp_path / 'stage.pickle')!r}, 'rb'))\n"
        f"torch.save({{'z': stage(torch.load({str(tmp_path / 'images.pt')!r})['images'])}}, {str(tmp_path / 'z.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=Path(first_stage.__file__).parents[2])
    assert torch.equal(torch.load(tmp_path / "z.pt")["z"], expected)


def test_weights_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, seed=3)
    loads: list[str] = []
    load = autoencoder.load

    def counted(*args: Any) -> autoencoder.Autoencoder:
        loads.append(args[0])
        return load(*args)

    monkeypatch.setattr(autoencoder, "load", counted)
    for _ in range(3):
        stage = FirstStage.of(FirstStageConfig(weights=str(tmp_path), options=OPTIONS))
        stage(pictures(1))
        pickle.loads(pickle.dumps(stage)).decode(torch.zeros(1, 3, 4, 4))
    assert len(loads) == 1


def test_weights_that_were_replaced_are_noticed(tmp_path: Path) -> None:
    saved(tmp_path, seed=3)
    config = FirstStageConfig(weights=str(tmp_path), options=OPTIONS)
    stage = FirstStage.of(config)
    stage(pictures(1))
    saved(tmp_path, seed=4)
    with pytest.raises(UsageError, match="have they been replaced"):
        stage(pictures(1))
    assert FirstStage.of(config).identity != stage.identity


def test_a_named_identity_is_kept_to(tmp_path: Path) -> None:
    identity = autoencoder.identity(saved(tmp_path, seed=3))
    config = FirstStageConfig(weights=str(tmp_path), options=OPTIONS, sha256=identity)
    assert FirstStage.of(config).identity == identity
    with pytest.raises(UsageError, match=f"first_stage.sha256 is {'0' * 64}, .* identity {identity}"):
        FirstStage.of(config.model_copy(update={"sha256": "0" * 64}))


def test_what_cannot_be_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'latent_unet' is a denoiser; first stages: autoencoder"):
        FirstStage.of(FirstStageConfig(name="latent_unet"))
    with pytest.raises(UsageError, match="did you mean 'vq_embed_dim'"):
        FirstStage.of(FirstStageConfig(options={"vq_embed": 3}))
    with pytest.raises(UsageError, match="nowhere"):
        FirstStage.of(FirstStageConfig(weights=str(tmp_path / "nowhere"), options=OPTIONS))
    stage = FirstStage.of(RANDOM)
    with pytest.raises(UsageError, match="take a multiple of 2"):
        stage.latent_shape(33)
    for wrong in (torch.zeros(1, 3, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.uint8)):
        with pytest.raises(UsageError, match=r"takes uint8 \[B, 3, H, W\]"):
            stage(wrong)


def test_the_papers_latents() -> None:
    settings = autoencoder.Config()
    assert (settings.channels, 256 // settings.factor) == (3, 64)


@pytest.mark.gpu
def test_on_a_gpu_it_does_the_same() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    here, there = FirstStage.of(RANDOM), FirstStage.of(RANDOM, device="cuda")
    images = pictures()
    torch.testing.assert_close(there(images).float(), here(images).float(), rtol=0, atol=1e-2)
    drawn = there.decode(here(images).float())
    assert drawn.device.type == "cuda"
    assert (drawn.cpu().int() - here.decode(here(images).float()).int()).abs().float().mean() < 1
