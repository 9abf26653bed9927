"""Trials of pictures: pixels, flips, labels and guidance; compiled, channels last and in bfloat16."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from trainer_state import assert_same, computed, everything

from raysparse import config, plugins, results, rng
from raysparse.data.loader import batch_indices
from raysparse.errors import UsageError
from raysparse.train import checks, run, setup, state

SGD = {"optimizer.name": "sgd", "optimizer.lr": 0.1, "optimizer.clip_norm": None}


def test_a_trial_of_pixels_from_start_to_record(pictures, rigl, tmp_path):
    trial = pictures(rigl)
    outcome = run.train(trial, tmp_path, device="cpu")
    assert outcome.state == "COMPLETED"
    table = results.read_trial(tmp_path / "records" / f"{trial.trial_id}.parquet")
    reports = results.reports_of(table)
    assert [report.step for report in reports] == [4, 8, 12]
    assert reports[-1].fid is not None
    assert reports[-1].topology_updates == 3
    assert reports[-1].density == pytest.approx(0.5, abs=1e-4)
    assert table["dataset"][0].as_py() == "hershey_pictures"


@pytest.mark.slow
def test_two_workers_share_pictures_as_one_has_them(pictures, tmp_path):
    trial = pictures(SGD, {"train.steps": 3, "data.options.flips": True, "train.accumulate": 2})
    found = []
    for workers in (1, 2):
        reports: list[results.Report] = []
        run.train(trial, tmp_path / str(workers), workers=workers, device="cpu", on_report=reports.append)
        found.append(reports[0])
    one, two = found
    assert one.train_loss == pytest.approx(two.train_loss, rel=1e-5)
    assert one.validation_loss == pytest.approx(two.validation_loss, rel=1e-5)
    assert one.fid == pytest.approx(two.fid, rel=1e-3)


def test_half_of_the_pictures_are_mirrored_and_no_two_steps_alike(pictures):
    trainer = setup.build(pictures({"data.options.flips": True, "train.batch_size": 48}))
    seen = []
    for step in range(4):
        trainer.step = step
        x, _, _ = trainer._share(0)
        indices = batch_indices(48, 48, 0, step)
        plain = trainer.examples.batch(indices)["x"]
        flipped = np.array([torch.equal(a, b.flip(-1)) for a, b in zip(x, plain, strict=True)])
        kept = np.array([torch.equal(a, b) for a, b in zip(x, plain, strict=True)])
        assert (flipped | kept).all()
        seen.append(tuple(flipped))
    assert 0.3 < np.mean(seen) < 0.7
    assert len(set(seen)) == 4


class Compiled(torch.nn.Module):
    """What torch.compile makes: its first call takes 100 s, each later one 1 s."""

    clock = 0.0

    def __init__(self, network: torch.nn.Module, **_: Any) -> None:
        super().__init__()
        self.network, self.takes_s = network, 100.0

    def forward(self, *given: torch.Tensor, **cond: torch.Tensor) -> Any:
        Compiled.clock += self.takes_s
        self.takes_s = 1.0
        return self.network(*given, **cond)


def test_the_seconds_of_compilation_are_apart_after_a_resume_too(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", Compiled)
    monkeypatch.setattr(time, "perf_counter", lambda: Compiled.clock)
    trial = pictures({"train.compile": True})
    first = setup.build(trial)
    report = next(first.run())
    assert (report.step, report.train_s, report.compile_s) == (4, 3.0, 100.0)
    second = setup.build(trial)
    state.load(second, state.save(first, tmp_path / "checkpoint"))
    *_, last = second.run()
    assert (last.step, last.train_s, last.compile_s) == (12, 10.0, 200.0)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "channels last": {"train.channels_last": True},
    "accumulated": {"train.accumulate": 2, "data.options.flips": True},
}
# Inductor compiles 69 kernels for the U-Net of the others (115 s of CPU), 40 for this one (70 s), 33 for the U-ViT.
SMALLER = {"model.options.block_out_channels": [8], "model.options.attention_levels": [True]}
UVIT = {
    "name": "uvit",
    "options": {"sample_size": 16, "in_channels": 3, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
}
COMPILED: dict[str, dict[str, Any]] = {
    "compiled": {"train.compile": True} | SMALLER,
    "compiled bf16": {"train.compile": True, "train.precision": "bf16", "model": UVIT},
}


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache")  # diffusers asks for a version
@pytest.mark.parametrize(
    "options",
    [
        *(pytest.param(options, id=name) for name, options in OPTIONS.items()),
        *(pytest.param(options, id=name, marks=pytest.mark.slow) for name, options in COMPILED.items()),
    ],
)
def test_options_are_right_under_masks_and_resume_bit_for_bit(pictures, rigl, tmp_path, options):
    trial = pictures(rigl, options)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    straight = setup.build(trial)
    expected = [computed(report) for report in straight.run()]
    assert straight.engine.updates == 3
    assert counters["stats"]["unique_graphs"] == trial.train.compile, "topology updates do not compile again"
    assert not counters["graph_break"]

    first = setup.build(trial)
    first.should_stop = lambda: first.step >= 5
    seen = [computed(report) for report in first.run()]
    second = setup.build(trial)
    state.load(second, state.save(first, tmp_path / "checkpoint"))
    assert seen + [computed(report) for report in second.run()] == expected
    assert_same(everything(second, tmp_path / "second"), everything(straight, tmp_path / "straight"))
    for name, mask in straight.engine.masks.items():
        weight = dict(straight.model.named_parameters())[name]
        for tensor in (weight, straight.ema.parameters()[name], *_moments(straight, weight)):
            assert not tensor[~mask].any()
        assert weight[mask].any()


def _moments(trainer, weight):
    return [kept for kept in trainer.optimizer.state[weight].values() if kept.shape == weight.shape]


def test_channels_last_reaches_weights_and_moments(pictures, tmp_path):
    trial = pictures({"train.channels_last": True, "train.steps": 4})
    trainer, other = setup.build(trial), setup.build(trial)
    list(trainer.run())
    state.load(other, state.save(trainer, tmp_path / "checkpoint"))
    for built in (trainer, other):
        kernels = [p for p in built.model.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
        assert kernels
        for kernel in kernels:
            assert kernel.is_contiguous(memory_format=torch.channels_last)
            assert all(kept.stride() == kernel.stride() for kept in _moments(built, kernel))


def test_bfloat16_trains_masked(pictures, rigl):
    trainer = setup.build(pictures(rigl, {"train.precision": "bf16"}))
    (*_, last) = trainer.run()
    assert last.fid is not None
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    for name, mask in trainer.engine.masks.items():
        assert not dict(trainer.model.named_parameters())[name][~mask].any()


@pytest.fixture
def two_classes(tmp_path):
    """The settings of a conditional trial on a folder with two class folders of 40 pictures, 16 x 16."""
    draw = rng.numpy_generator(0, "two classes")
    for name, bright in (("dark", 80), ("light", 255)):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for number in range(40):
            pixels = draw.integers(bright - 80, bright, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "classes" / name / f"{number}.png")
    options = {"size_px": 16, "conditional": True, "validation_examples": 16}
    data = {"name": "imagefolder", "source": str(tmp_path / "classes"), "root": str(tmp_path), "options": options}
    return {"data": data, "model.options.num_classes": 2, "model.options.context_dim": 8}


def test_labels_are_dropped_and_guide(pictures, two_classes):
    trial = pictures(two_classes, {"train.label_dropout": 0.5, "train.batch_size": 48, "train.steps": 4})
    trainer = setup.build(trial)
    null = trainer.model.null_label
    assert null == 2
    _, cond, _ = trainer._share(0)
    assert 0.2 < float((cond["labels"] == null).float().mean()) < 0.8
    list(trainer.run())

    guided = trial.model_copy(update={"evaluate": trial.evaluate.model_copy(update={"guidance": 3.0})})
    plain_x, cond = setup.evaluator(trial).sampler.batch(trainer.model, 0, 4)
    guided_x, guided_cond = setup.evaluator(guided).sampler.batch(trainer.model, 0, 4)
    assert torch.equal(cond["labels"], guided_cond["labels"])
    assert not torch.allclose(plain_x, guided_x)
    assert setup.protocol(guided) == dataclasses.replace(setup.protocol(trial), guidance=3.0)
    assert setup.estimate(guided).inference(setup.flops.TRUE) == 2 * setup.estimate(trial).inference(setup.flops.TRUE)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.name": "autoencoder", "model.options": {}}, "'autoencoder' is a first stage, not a denoiser"),
        ({"train.label_dropout": 0.1}, "train.label_dropout is 0.1, but latent_unet has no null class here"),
        ({"evaluate.guidance": 3.0}, "evaluate.guidance is 3.0, but latent_unet has no null class here"),
        ({"model.options.sample_size": 32}, r"takes x of shape \[3, 32, 32\].*examples of shape \[3, 16, 16\]"),
        ({"model": {"name": "chirodiff"}}, r"chirodiff takes sketches.*examples of shape \[3, 16, 16\]"),
        ({"data": {"name": "hershey"}}, r"latent_unet takes x of shape \[3, 16, 16\].*has sketches"),
        ({"data": {"name": "hershey"}, "first_stage": {}}, "hershey holds sketches; leave it out"),
        ({"first_stage": {"name": "ddpm_unet"}}, "'ddpm_unet' is a denoiser"),
        ({"model.options.num_classes": 7}, "num_classes is 7, but the data set has no classes; set it to null"),
        ({"data.options.conditional": True}, "conditional needs classes, and this source has none|has no classes"),
        ({"evaluate.timestep_spacing": "leadin"}, "timestep_spacing"),
    ],
)
def test_parts_that_do_not_go_together(pictures, data_root, changes, said):
    content = pictures().model_dump(mode="json")
    for path, value in changes.items():
        content = config.with_value(content, path, value)
    content = config.with_value(content, "data.root", str(data_root))
    with pytest.raises(UsageError, match=said):
        _start(content)


def _start(content):
    trial = config.parse(content)
    setup.check(trial)
    setup.prepare_data(trial)


def test_every_denoiser_says_the_shape_of_its_examples():
    for name in plugins.names("models"):
        if plugins.load("models", name).KIND == "denoiser":
            trial = config.parse({"model": {"name": name, "options": plugins.load("models", name).SMALL}})
            assert len(checks.value_shape(trial)) == (2 if name == "chirodiff" else 3)
