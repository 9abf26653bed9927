"""Trained models back from disk: the right checkpoint, whole, and the averaged weights of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from train_checkpoints import RIGL, STEP, in_results, save, trial

from raysparse.errors import UsageError
from raysparse.models import autoencoder
from raysparse.train import draw, restored, state


@pytest.fixture(params=["latent_unet", "ddpm_unet", "chirodiff"])
def name(request) -> str:
    return request.param


@pytest.mark.parametrize("sparse", [{"method": "dense"}, RIGL], ids=["dense", "rigl"])
def test_the_averaged_masked_model_comes_back(name, sparse, tmp_path):
    config = trial(name, sparse=sparse)
    found = restored.load(save(tmp_path / "c", config))
    assert (found.config, found.step, found.trial_id) == (config, STEP, config.trial_id)
    assert not found.model.training
    assert not any(parameter.requires_grad for parameter in found.model.parameters())
    saved = safetensors.torch.load_file(tmp_path / "c" / "ema.safetensors")
    loaded = {f"ema.{name}": tensor for name, tensor in found.model.state_dict().items()}
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)
    weights = dict(found.model.named_parameters())
    assert bool(found.masks) == (sparse is RIGL)
    for key, mask in found.masks.items():
        assert mask.dtype == torch.bool
        assert not weights[key][~mask].any()


def test_what_a_user_may_give_for_a_trial(tmp_path):
    config = trial()
    in_results(tmp_path, config, step=5)
    last = in_results(tmp_path, config, step=40)
    (last.parent / f"{state.TEMPORARY}x").mkdir()  # an interrupted save
    (tmp_path / "records").mkdir()
    for given in (last, last.parent, last.parent.parent, tmp_path):
        assert restored.load(given).folder == last
        assert restored.find(given) == [last]
    assert (last.parent / f"{state.TEMPORARY}x").exists()  # another process may be writing it
    assert restored.load(state.at_step(last.parent, 5)).folder != last


def test_all_trials_below_a_results_folder(tmp_path):
    configs = [trial(seed=seed) for seed in range(3)]
    made = [in_results(tmp_path, config) for config in configs]
    (tmp_path / "checkpoints" / "dense-0000000000").mkdir()  # a trial that has none yet
    assert restored.find(tmp_path) == sorted(made)
    with pytest.raises(UsageError, match=r"holds 3 trials; give the folder of one, such as .*dense-"):
        restored.load(tmp_path)


def test_of_several_trials_those_at_their_last_step_are_evaluated(tmp_path):
    stopped = in_results(tmp_path, trial(seed=0, train__steps=STEP + 1))
    assert restored.to_evaluate(tmp_path) == ([stopped], []), "the one trial of a folder, as it is"
    also = in_results(tmp_path, trial(seed=1, train__steps=STEP + 1))
    with pytest.raises(UsageError, match=r"none of the 2 trials in .* give its folder, such as .*checkpoints/"):
        restored.to_evaluate(tmp_path)
    ended = in_results(tmp_path, trial(seed=2, train__steps=STEP))
    for given in (tmp_path, tmp_path / "checkpoints"):
        assert restored.to_evaluate(given) == ([ended], sorted([stopped, also]))
    for given in (stopped, stopped.parent):
        assert restored.to_evaluate(given) == ([stopped], [])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "is absent"),
        (lambda path: path.write_text("x"), "is a file"),
        (lambda path: path.mkdir(), "there is no checkpoint in"),
        (lambda path: (path / "checkpoints").mkdir(parents=True), "there is no checkpoint in"),
        (lambda path: (path / "step-000000001").mkdir(parents=True), r"it has no manifest\.json"),
        (lambda path: (path.mkdir(), (path / "manifest.json").write_text("{}")), "is of something else"),
        (lambda path: (path.mkdir(), (path / "manifest.json").write_text("[1]")), "is of something else"),
        (lambda path: (path.mkdir(), (path / "manifest.json").write_text("{")), "damaged"),
        (lambda path: (path.mkdir(), (path / "raysparse.json").write_text("{}")), "raysparse import"),
    ],
)
def test_what_is_no_checkpoint_is_told(tmp_path, make, message):
    make(tmp_path / "given")
    with pytest.raises(UsageError, match=message):
        restored.load(tmp_path / "given")


@pytest.mark.parametrize("name", ["ema.safetensors", "engine.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty", "absent"])
def test_damage_is_refused_by_name(tmp_path, name, damage):
    folder = save(tmp_path / "c", trial(sparse=RIGL))
    path = folder / name
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    path.write_bytes({"truncated": data[: len(data) // 2], "one bit": data, "empty": b"", "absent": b""}[damage])
    if damage == "absent":
        path.unlink()
    with pytest.raises(UsageError, match=name.replace(".", r"\.")):
        restored.load(folder)


def test_weights_and_moments_need_not_be_there(tmp_path):
    folder = save(tmp_path / "c", trial(sparse=RIGL))
    for name in ("weights", "optimizer"):
        (folder / f"{name}.safetensors").unlink()
    assert restored.load(folder).masks


def rewritten(folder: Path, **facts) -> Path:
    """The checkpoint with other facts in its manifest, sealed anew: what another program might write."""
    content = state.manifest(folder) | facts
    text = json.dumps(content, sort_keys=True).encode()
    (folder / "manifest.json").write_text(json.dumps({"content": content, "sha256": state._sha256(text)}))
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (trial("ddpm_unet"), r"no weights of model 'ddpm_unet': .* is float32 \[16, 3"),
        (trial("chirodiff"), "no weights of model 'chirodiff': missing 'frequencies'"),
        (
            trial(model__options__block_out_channels=[8, 32], model__options__norm_num_groups=4),
            r"the model's is float32",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, config, message):
    folder = rewritten(save(tmp_path / "c", trial()), config=config.model_dump(mode="json"))
    with pytest.raises(UsageError, match=message):
        restored.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights, masks, name: masks.update({"unet.none": masks.pop(name)}), "does not have: 'unet.none'"),
        (lambda weights, masks, name: masks.update({name: masks[name][:1]}), "the mask of 'unet.conv_in.weight' is"),
        (lambda weights, masks, name: masks.update({name: masks[name].float()}), "is float32"),
        (lambda weights, masks, name: masks.update({name: ~masks[name]}), "'unet.conv_in.weight' is not 0 outside"),
        (lambda weights, masks, name: weights[name].view(-1)[3].fill_(torch.nan), "NaN or infinity in 'unet.conv_in"),
        (lambda weights, masks, name: weights[name].view(-1)[0].fill_(-torch.inf), "NaN or infinity in 'unet.conv_in"),
        (lambda weights, masks, name: weights.pop(name), "missing 'unet.conv_in.weight'"),
        (lambda weights, masks, name: weights.update(more=weights[name]), "unknown 'more'"),
        (lambda weights, masks, name: weights.update({name: weights[name].half()}), r"is float16 \[16, 3, 3, 3\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, change, message):
    config = trial(sparse=RIGL)
    found = restored.load(save(tmp_path / "c", config))
    weights, masks = dict(found.model.state_dict()), dict(found.masks)
    restored.model_of(config, weights, masks, "here")
    change(weights, masks, "unet.conv_in.weight")
    with pytest.raises(UsageError, match=message):
        restored.model_of(config, weights, masks, "here")


@pytest.mark.parametrize(
    "sparse",
    [
        RIGL | {"pattern": "block", "block": 4},
        RIGL | {"pattern": "diagonal"},
        RIGL | {"pattern": "nm", "m": 4},
        {"method": "nm_ste", "sparsity": 0.5},
    ],
    ids=str,
)
def test_masks_that_do_not_keep_the_pattern_are_refused(tmp_path, sparse):
    config = trial("uvit", sparse=sparse)
    found = restored.load(save(tmp_path / "c", config))
    weights, masks = dict(found.model.state_dict()), dict(found.masks)
    name = next(name for name, mask in masks.items() if not mask.all())
    one = masks[name].nonzero()[0]
    masks[name] = masks[name].index_put(tuple(one), torch.tensor(False))
    weights[name] = weights[name] * masks[name]
    pattern = "nm" if sparse["method"] == "nm_ste" else sparse["pattern"]
    with pytest.raises(UsageError, match=rf"here: these masks do not keep sparse\.pattern '{pattern}'.*'{name}'"):
        restored.model_of(config, weights, masks, "here")
    assert restored.model_of(trial("uvit", sparse=RIGL), weights, masks, "here"), "single weights need no pattern"


def test_stages_have_patterns_of_their_own(tmp_path):
    staged = trial("uvit", sparse={"method": "nm_ste", "sparsity": 0.5, "stages": "progressive"})
    assert restored.load(save(tmp_path / "c", staged)).masks


def test_a_checkpoint_may_be_moved_and_its_folder_read_only(tmp_path):
    folder = in_results(tmp_path, trial())
    moved = tmp_path / "elsewhere" / "model"
    shutil.copytree(folder, moved)
    for path in moved.iterdir():
        path.chmod(0o444)
    assert restored.load(moved).folder == moved


def test_samples_are_decoded_by_the_first_stage_that_was_trained_on(tmp_path):
    stage = {"options": json.loads(json.dumps(autoencoder.SMALL))}
    checkpoint = save(
        tmp_path / "c", trial(first_stage=stage, data={"name": "imagefolder", "options": {"size_px": 16}})
    )
    content = state.manifest(checkpoint) | {"origin": {"examples": "a", "first_stage": "b" * 64}}
    parts = {part: state.read(checkpoint, part, content) for part in state.PARTS}
    state.write(checkpoint, parts, {name: content[name] for name in ("trial_id", "config", "step", "origin")})
    with pytest.raises(UsageError, match=f"sha256 is {'b' * 64}, but first_stage.weights None have the identity"):
        next(draw.draw(checkpoint, 1))
