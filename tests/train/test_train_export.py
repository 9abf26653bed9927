"""Export: plain diffusers makes the same samples; the folder is whole or absent and holds nothing private."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import yaml
from train_checkpoints import FIRST_STAGE, RIGL, STEP, contents, save, trial

from raysparse.diffusion import ddim
from raysparse.diffusion.guidance import guided
from raysparse.diffusion.schedule import NoiseSchedule
from raysparse.errors import UsageError
from raysparse.models import autoencoder
from raysparse.train import diffusers_parts, export, restored
from raysparse.train.first_stage import FirstStage

UNET = "unet/diffusion_pytorch_model.safetensors"
SPARSE = pytest.mark.parametrize("sparse", [{"method": "dense"}, RIGL], ids=["dense", "rigl"])


def ours(model: restored.Restored, steps: int, count: int, eta: float = 0.0, **given: Any) -> torch.Tensor:
    """Samples by raysparse; all draws come from one generator, as in diffusers' pipelines."""
    settings, draw = model.config.evaluate, torch.Generator().manual_seed(5)
    size, channels = model.model.config.sample_size, model.model.config.in_channels
    return ddim.sample(
        given.pop("network", model.model),
        NoiseSchedule(**model.config.diffusion.model_dump()),
        torch.randn(count, channels, size, size, generator=draw),
        steps=steps,
        eta=eta,
        generator=draw,
        spacing=settings.timestep_spacing,
        **given,
    )


def as_pictures(x: torch.Tensor) -> np.ndarray[Any, Any]:
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@SPARSE
@pytest.mark.parametrize("name", ["latent_unet", "ddpm_unet"])
@pytest.mark.parametrize(
    ("steps", "eta", "spacing"),
    [(10, 0.0, "original"), (50, 0.0, "original"), (10, 0.0, "leading"), (50, 0.0, "trailing"), (10, 1.0, "original")],
)
def test_a_ddim_pipeline_makes_the_same_samples(tmp_path, name, sparse, steps, eta, spacing):
    from diffusers import DDIMPipeline

    config = trial(name, sparse=sparse, evaluate__timestep_spacing=spacing)
    checkpoint = save(tmp_path / "c", config)
    folder = export.export(checkpoint, tmp_path / "out")
    pipeline = DDIMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(5)
    theirs = pipeline(2, generator=draw, eta=eta, num_inference_steps=steps, output_type="np").images
    mine = ours(restored.load(checkpoint), steps, 2, eta)
    assert np.abs(as_pictures(mine) - theirs).max() <= 1e-4
    assert mine.std() > 0.1
    # without the pipeline's clamp, by its parts
    x = torch.randn(2, 3, 8, 8, generator=draw.manual_seed(5))
    with torch.no_grad():
        for t in pipeline.scheduler.timesteps:
            x = pipeline.scheduler.step(pipeline.unet(x, t).sample, t, x, eta=eta, generator=draw).prev_sample
    assert (x - mine).abs().max() <= 1e-4 * max(1.0, float(mine.abs().max()))


@SPARSE
@pytest.mark.parametrize("steps", [10, 50])
def test_an_ldm_pipeline_makes_the_same_pictures(tmp_path, sparse, steps):
    from diffusers import LDMPipeline

    config = trial(sparse=sparse, first_stage=FIRST_STAGE)
    checkpoint = save(tmp_path / "c", config)
    folder = export.export(checkpoint, tmp_path / "out")
    pipeline = LDMPipeline.from_pretrained(folder)
    assert pipeline.vqvae.config.scaling_factor == 1.0
    pipeline.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(5)
    theirs = pipeline(2, generator=draw, num_inference_steps=steps, output_type="np").images
    latents = ours(restored.load(checkpoint), steps, 2)
    with torch.no_grad():
        decoded = autoencoder.build(autoencoder.Config(**FIRST_STAGE["options"]), seed=0).decode(latents)
    assert theirs.shape == (2, 16, 16, 3)
    assert np.abs(as_pictures(decoded) - theirs).max() <= 1e-4
    pictures = FirstStage.of(config.first_stage).decode(latents)  # what is evaluated: 8 bits
    assert np.abs(pictures.permute(0, 2, 3, 1).numpy() / 255 - theirs).max() <= 0.5 / 255 + 1e-4
    assert len(np.unique(theirs.round(3))) > 50  # pictures, not one colour


@pytest.mark.parametrize("guidance", [None, 3.0])
@pytest.mark.parametrize("first_stage", [None, FIRST_STAGE], ids=["pixels", "latents"])
def test_the_card_of_a_conditional_model_makes_the_same_samples(tmp_path, guidance, first_stage):
    config = trial(
        model__options__num_classes=4,
        model__options__context_dim=16,
        evaluate__guidance=guidance,
        sparse=RIGL,
        first_stage=first_stage,
    )
    checkpoint = save(tmp_path / "c", config)
    folder = export.export(checkpoint, tmp_path / "out")
    assert not (folder / "model_index.json").exists()
    assert "pipeline_tag" not in yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    found = run_card(
        folder, "x = torch.randn(", "x = torch.randn(generator=torch.Generator().manual_seed(5), size=(", ")"
    )
    model = restored.load(checkpoint)
    network = model.model if guidance is None else guided(model.model, guidance, 4)
    mine = ours(model, 10, 1, network=network, cond={"labels": torch.tensor([0])})
    if first_stage is None:
        assert (found["x"] - mine).abs().max() <= 1e-4
    else:
        pictures = FirstStage.of(config.first_stage).decode(mine)
        assert (found["picture"] - pictures / 255).abs().max() <= 0.5 / 255 + 1e-4


def run_card(folder: Path, before: str = "", after: str = "", close: str = "") -> dict[str, Any]:
    """Run the Python of an exported folder's README; `before` is replaced by `after` and its line closed."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    lines = code.replace("THIS_FOLDER", str(folder)).splitlines()
    if before:
        lines = [line.replace(before, after) + close if before in line else line for line in lines]
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)
    return names


@pytest.mark.parametrize("first_stage", [None, FIRST_STAGE], ids=["DDIMPipeline", "LDMPipeline"])
def test_the_card_of_an_unconditional_model_runs(tmp_path, first_stage):
    folder = export.export(save(tmp_path / "c", trial(first_stage=first_stage)), tmp_path / "out")
    found = run_card(folder)
    assert type(found["pipeline"]).__name__ == ("LDMPipeline" if first_stage else "DDIMPipeline")
    assert found["picture"].size == ((16, 16) if first_stage else (8, 8))


@pytest.mark.parametrize("spacing", ddim.SPACINGS)
@pytest.mark.parametrize("steps", [1, 7, 10, 50, 100, 150, 167, 200, 333, 500, 1000])
def test_the_step_counts_said_to_be_equal_are_the_equal_ones(spacing, steps):
    """Both sample with an eps that depends on t, so that any other timestep or noise level shows."""
    config = trial(evaluate__timestep_spacing=spacing)
    noise = torch.randn(4, generator=torch.Generator().manual_seed(0))

    def eps(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (0.1 * x + torch.sin(t / 50.0)).float()

    def theirs() -> torch.Tensor:
        scheduler, x = diffusers_parts.scheduler(config), noise
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            if t == 1000:
                return torch.full_like(noise, math.inf)  # diffusers' own fails here: there is no such timestep
            x = scheduler.step(eps(x, t), t, x).prev_sample
        return x

    schedule = NoiseSchedule(**config.diffusion.model_dump())
    ours = ddim.sample(lambda x, t: eps(x, t[0]), schedule, noise, steps=steps, spacing=spacing)
    same = bool((theirs() - ours).abs().max() <= 1e-5 * ours.abs().max())  # x grows to 100
    assert same == (steps in diffusers_parts.equal_steps(config))
    assert same or steps not in (1, 10, 50, 100, 200, 500)


@pytest.mark.slow
def test_an_export_in_another_process_has_the_same_bytes(tmp_path):
    """safetensors writes a header's entries in an order that differs between processes."""
    checkpoint = save(tmp_path / "c", trial(sparse=RIGL))
    here = contents(export.export(checkpoint, tmp_path / "here"))
    words = ["export", str(checkpoint), "--to", str(tmp_path / "there")]
    code = f"import sys; sys.argv[1:] = {words!r}; from raysparse import cli; cli.main()"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert contents(tmp_path / "there") == here


def test_masks_can_be_read_with_numpy_alone(tmp_path):
    """By the file's own description, without raysparse."""
    from diffusers import UNet2DModel

    checkpoint = save(tmp_path / "c", trial(sparse=RIGL))
    folder = export.export(checkpoint, tmp_path / "out")
    unet, expected = UNet2DModel.from_pretrained(folder / "unet"), restored.load(checkpoint).masks
    with safetensors.safe_open(folder / "sparsity" / "masks.safetensors", framework="np") as file:
        header = json.loads(file.metadata()["raysparse"])
        assert header["weights_sha256"] == hashlib.sha256((folder / header["weights_file"]).read_bytes()).hexdigest()
        assert (header["method"], header["sparsity"], header["step"]) == ("rigl", 0.5, STEP)
        total = 0
        for name, facts in header["tensors"].items():
            packed = file.get_tensor(name)
            mask = np.unpackbits(packed, count=math.prod(facts["shape"])).reshape(facts["shape"]).astype(bool)
            weight = unet.get_parameter(name).detach().numpy()
            assert weight.shape == mask.shape
            assert not weight[~mask].any()
            assert facts["density"] == mask.mean()
            assert np.array_equal(mask, expected[f"unet.{name}"].numpy())
            total += mask.sum()
    sizes = sum(mask.numel() for mask in expected.values())
    assert total == round(sizes / 2)


def test_nothing_of_the_machine_and_nothing_pickled_is_in_the_folder(tmp_path):
    stage = export_stage(tmp_path)
    config = trial(first_stage=FIRST_STAGE | {"weights": str(stage)}, sparse=RIGL)
    folder = export.export(save(tmp_path / "c", config), tmp_path / "out")
    for name, data in contents(folder).items():
        assert name.endswith((".safetensors", ".json", ".md"))
        assert b"/home/somebody" not in data
        assert str(tmp_path).encode() not in data


def export_stage(tmp_path: Path) -> Path:
    """A first stage as a diffusers folder."""
    folder = export.export(save(tmp_path / "s", trial(first_stage=FIRST_STAGE)), tmp_path / "stage")
    return folder / "vqvae"


def test_a_first_stage_that_moved_is_named_and_its_sha256_is_kept_to(tmp_path):
    stage = export_stage(tmp_path)
    identity = FirstStage.of(trial(first_stage=FIRST_STAGE).first_stage).identity
    gone = FIRST_STAGE | {"weights": str(tmp_path / "gone"), "sha256": identity}
    checkpoint = save(tmp_path / "c", trial(first_stage=gone))
    with pytest.raises(UsageError, match="gone"):
        export.export(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    folder = export.export(checkpoint, tmp_path / "out", first_stage=str(stage))
    assert (folder / "vqvae" / "diffusion_pytorch_model.safetensors").is_file()
    shutil.rmtree(stage)
    back = restored.load(export.import_(folder, tmp_path / "back"))  # brings its own
    assert FirstStage.of(back.config.first_stage).identity == identity
    assert back.config.trial_id == back.trial_id  # weights named by their sha256 are the same trial anywhere
    wrong = save(tmp_path / "w", trial(first_stage=gone | {"sha256": "0" * 64}))
    with pytest.raises(UsageError, match=r"first_stage\.sha256 is 0000"):
        export.export(wrong, tmp_path / "wrong", first_stage=str(folder / "vqvae"))
    with pytest.raises(UsageError, match="has no first stage; leave --first-stage out"):
        export.export(save(tmp_path / "p", trial()), tmp_path / "wrong", first_stage=str(folder / "vqvae"))


def test_a_model_that_diffusers_lacks_is_plain_safetensors(tmp_path):
    folder = export.export(save(tmp_path / "c", trial("chirodiff", sparse=RIGL)), tmp_path / "out")
    names = ["README.md", "model.safetensors", "raysparse.json", "sparsity/masks.safetensors"]
    assert sorted(contents(folder)) == names
    card = (folder / "README.md").read_text()
    assert "is no model of diffusers" in card
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "raysparse"


@pytest.mark.parametrize("there", ["a file in it", "file", "link"])
def test_nothing_is_overwritten(tmp_path, there):
    checkpoint = save(tmp_path / "c", trial())
    folder, to = export.export(checkpoint, tmp_path / "out"), tmp_path / "to"
    if there == "file":
        to.write_text("mine")
    elif there == "link":
        (tmp_path / "empty").mkdir()
        to.symlink_to(tmp_path / "empty")
    else:
        to.mkdir()
        (to / "mine").write_text("mine")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError, match=r"to is (not empty|there)"):
        export.export(checkpoint, to)
    with pytest.raises(UsageError, match=r"to is (not empty|there)"):
        export.import_(folder, to)
    assert sorted(tmp_path.iterdir()) == before


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    assert export.export(save(tmp_path / "c", trial()), tmp_path / "out") == tmp_path / "out"
    folder = export.import_(tmp_path / "out", tmp_path / "back")
    for path in [*(tmp_path / "out").rglob("*"), tmp_path / "out", *folder.rglob("*"), folder]:  # others may read them
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("work", ["export", "import"])
def test_what_is_interrupted_leaves_nothing(tmp_path, monkeypatch, error, work):
    checkpoint = save(tmp_path / "c", trial(sparse=RIGL))
    folder = export.export(checkpoint, tmp_path / "out")
    before = sorted(tmp_path.iterdir())

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(export.bitmasks, "save", fail)
    monkeypatch.setattr(export.state, "write", fail)
    expected = UsageError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        export.export(checkpoint, tmp_path / "to") if work == "export" else export.import_(folder, tmp_path / "to")
    assert "No space left" in str(caught.value) or expected is KeyboardInterrupt
    assert sorted(tmp_path.iterdir()) == before
