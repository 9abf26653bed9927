"""Teachers: which folders are one, which are refused, and that a U-Net of diffusers comes in to the bit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from raysparse import config, plugins
from raysparse.errors import UsageError
from raysparse.train import draw, export, reevaluate, run, setup, teacher

UNET = {
    "model.name": "ddpm_unet",
    "model.options": {
        "sample_size": 16,
        "block_out_channels": [8, 16],
        "attention_levels": [False, True],
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
    "diffusion": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "sparse.method": "nm_ste",
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A pipeline's folder as diffusers writes it, of a small DDPM U-Net with its own weights."""
    from diffusers import DDPMScheduler

    folder = tmp_path_factory.mktemp("pipeline")
    module = plugins.load("models", "ddpm_unet")
    model = module.build(module.Config(**UNET["model.options"]), seed=9)
    model.unet.save_pretrained(folder / "unet")
    DDPMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02).save_pretrained(folder / "scheduler")
    return folder


def flat(pipeline, folder):
    """As google/ddpm-cifar10-32 lies on the Hub: all in one folder."""
    shutil.copytree(pipeline / "unet", folder)
    shutil.copy(pipeline / "scheduler/scheduler_config.json", folder)
    return folder


def edited(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("layout", ["pipeline", "flat"])
def test_a_diffusers_folder_is_a_teacher(pictures, pipeline, tmp_path, layout):
    folder = pipeline if layout == "pipeline" else flat(pipeline, tmp_path / "flat")
    trial = pictures(UNET, {"sparse.teacher": str(folder), "sparse.start": "teacher", "sparse.loss": "both"})
    module = plugins.load("models", "ddpm_unet")
    theirs = module.build(module.Config(**UNET["model.options"]), seed=9).state_dict()
    trainer = setup.build(trial)
    assert all(torch.equal(value, theirs[name]) for name, value in trainer.teacher._model.state_dict().items())
    assert sorted(trainer.engine.layout.dense) == ["unet.conv_in.weight"]  # 3 inputs
    trainer._train_step()
    for name, mask in trainer.engine.masks.items():
        if name not in trainer.engine.layout.dense:
            assert (mask.movedim(1, -1).reshape(-1, 4).sum(1) == 2).all(), name


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("scheduler/scheduler_config.json", {"beta_end": 0.01}, "beta_end 0.01.*same noise schedule"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 500}, "num_train_timesteps 500"),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "'v_prediction', not the noise"),
        ("unet/config.json", {"norm_num_groups": 2}, "norm_num_groups 2.*same architecture"),
        ("unet/config.json", {"_class_name": "UNet2DConditionModel"}, "is a UNet2DConditionModel"),
        ("unet/config.json", {"block_out_channels": [8, 24]}, r"block_out_channels \[8, 24\]"),
        ("scheduler/scheduler_config.json", None, "noise schedule is unknown"),
        ("unet/diffusion_pytorch_model.safetensors", None, "does not load"),
    ],
)
def test_another_network_or_noise_schedule_is_refused(pictures, pipeline, tmp_path, file, changes, message):
    folder = shutil.copytree(pipeline, tmp_path / "other")
    if changes is None:
        (folder / file).unlink()
    else:
        edited(folder / file, **changes)
    trial = pictures(UNET, {"sparse.teacher": str(folder), "sparse.loss": "teacher"})
    with pytest.raises(UsageError, match=message):
        setup.check(trial)


def test_what_learned_from_a_teacher_does_not_need_it_any_more(pictures, pipeline, tmp_path):
    place = shutil.copytree(pipeline, tmp_path / "its teacher")
    trial = pictures(UNET, {"sparse.teacher": str(place), "sparse.loss": "both", "train.steps": 4})
    assert run.train(trial, tmp_path / "out", device="cpu").state == "COMPLETED"
    place.rename(tmp_path / "elsewhere")
    (before,) = draw.draw(tmp_path / "out", 4)
    assert reevaluate.evaluate(tmp_path / "out", [{"evaluate.ddim_steps": 2}], device="cpu")

    folder = export.export(tmp_path / "out", tmp_path / "exported")
    for name in ("raysparse.json", "README.md"):
        assert "its teacher" not in (folder / name).read_text()
    assert "| `loss` | both |" in (folder / "README.md").read_text()
    back = export.import_(folder, tmp_path / "back")
    (again,) = draw.draw(back, 4)
    assert torch.equal(again, before)
    assert reevaluate.evaluate(back, [{"data.root": trial.data.root, "evaluate.ddim_steps": 2}], device="cpu")

    settings = json.loads((folder / "raysparse.json").read_text())["content"]["config"]
    with pytest.raises(UsageError, match="do not say where its teacher lies"):
        setup.check(config.parse(settings))


def test_checkpoints_that_are_no_teachers(tiny, tmp_path, pipeline):
    def check(changes, message, **others):
        with pytest.raises(UsageError, match=message):
            teacher.load(tiny({"sparse.method": "nm_ste", "sparse.start": "teacher", **changes}, others))

    check({"sparse.teacher": str(tmp_path / "absent")}, "is no folder; give a dense checkpoint")
    check({"sparse.teacher": str(pipeline)}, "noise|not a network of diffusers")
    run.train(tiny({"train.steps": 4, "sparse.method": "static"}), tmp_path / "sparse", device="cpu")
    check({"sparse.teacher": str(tmp_path / "sparse")}, "was trained by static; a teacher is dense")
    run.train(tiny({"train.steps": 4}), tmp_path / "dense", device="cpu")
    given = {"sparse.teacher": str(tmp_path / "dense")}
    check({**given, "model.options": {"hidden": 16, "layers": 1}}, "'hidden': 8.*same architecture")
    check({**given, "diffusion.beta_end": 0.01}, "noise schedule")
    assert teacher.load(tiny({"sparse.method": "nm_ste", "sparse.start": "teacher", **given})) is not None
    (tmp_path / "empty").mkdir()
    check({"sparse.teacher": str(tmp_path / "empty")}, "no checkpoint")


def test_the_last_stage_must_be_reached(tiny):
    with pytest.raises(UsageError, match="begin the last one at step 400000, but"):
        setup.check(tiny({"sparse.method": "nm_ste", "sparse.stages": "progressive"}))
