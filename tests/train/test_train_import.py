"""Import: every bit of masks and weights comes back, or the folder is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from train_checkpoints import FIRST_STAGE, RIGL, bits, contents, in_results, save, trial

from raysparse import cli
from raysparse.errors import UsageError
from raysparse.train import export, restored, state

UNET = "unet/diffusion_pytorch_model.safetensors"
SPARSE = pytest.mark.parametrize("sparse", [{"method": "dense"}, RIGL], ids=["dense", "rigl"])


@SPARSE
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("latent_unet", {}),
        ("latent_unet", {"first_stage": FIRST_STAGE}),
        ("uvit", {"first_stage": FIRST_STAGE}),  # which diffusers does not have
        ("latent_unet", {"model__options__num_classes": 4, "model__options__context_dim": 16}),
        ("ddpm_unet", {"train__channels_last": True}),
        ("chirodiff", {}),
    ],
    ids=["pixels", "latents", "uvit_latents", "classes", "channels_last", "sketches"],
)
def test_a_round_trip_keeps_every_bit(tmp_path, name, changes, sparse):
    checkpoint = save(tmp_path / "c", trial(name, sparse=sparse, **changes))
    first, folder = restored.load(checkpoint), export.export(checkpoint, tmp_path / "out")
    back = restored.load(export.import_(folder, tmp_path / "back"))
    assert (back.step, back.trial_id, back.config.sparse) == (first.step, first.trial_id, first.config.sparse)
    assert bits(back.model.state_dict()) == bits(first.model.state_dict())
    assert back.masks.keys() == first.masks.keys()
    for key, mask in first.masks.items():
        weight = dict(first.model.named_parameters())[key]
        assert torch.equal(back.masks[key], mask)
        assert (mask & (weight == 0)).sum() >= 2  # active zeros, one of them -0, stay active
    again = export.export(tmp_path / "back", tmp_path / "again")
    assert contents(again) == contents(folder)
    (tmp_path / "back").rename(tmp_path / "moved")  # an imported folder holds no path of where it was
    assert contents(export.export(tmp_path / "moved", tmp_path / "third")) == contents(folder)


def test_a_snapshot_of_links_as_the_hub_keeps_them_is_imported(tmp_path):
    folder = export.export(save(tmp_path / "c", trial(sparse=RIGL)), tmp_path / "out")
    snapshot = tmp_path / "snapshot"
    for name in contents(folder):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(folder / name)
    (snapshot / ".gitattributes").write_text("*.safetensors filter=lfs")
    (snapshot / "README.md").unlink()
    (snapshot / "README.md").write_text("my own words")
    assert restored.load(export.import_(snapshot, tmp_path / "back")).masks


def test_an_imported_model_cannot_be_trained_on(tmp_path):
    config = trial(sparse=RIGL)
    folder = export.import_(export.export(save(tmp_path / "c", config), tmp_path / "out"), tmp_path / "back")
    with pytest.raises(UsageError, match="was imported and has no weights, optimizer"):
        state.load(SimpleNamespace(config=config), folder)


def test_a_damaged_imported_folder_is_to_be_imported_again(tmp_path):
    folder = export.import_(
        export.export(save(tmp_path / "c", trial(sparse=RIGL)), tmp_path / "out"), tmp_path / "back"
    )
    again = rf"remove the folder {folder} and make it again, such as by: raysparse import EXPORTED --to {folder}$"
    (folder / "ema.safetensors").unlink()
    with pytest.raises(UsageError, match=rf"ema\.safetensors is damaged .*{again}"):
        restored.load(folder)
    (folder / state.MANIFEST).write_text("{")
    with pytest.raises(UsageError, match=rf"manifest\.json is damaged .*{again}"):
        restored.load(folder)


# What may be wrong with a folder


def seal(folder: Path, **changes: Any) -> None:
    """Change raysparse.json and its own hash, as somebody who wants to deceive would."""
    path = folder / "raysparse.json"
    content = json.loads(path.read_text())["content"] | changes
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"content": content, "sha256": digest}))


def rehash(folder: Path) -> None:
    """Make all hashes right for the files as they are now."""
    old = json.loads((folder / "raysparse.json").read_text())["content"]["sha256"]
    seal(folder, sha256={name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in old})


def change_masks(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> None:
    path = folder / "sparsity" / "masks.safetensors"
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["raysparse"])
        tensors = {name: file.get_tensor(name) for name in header["tensors"]}
    change(header, tensors)
    header["weights_sha256"] = hashlib.sha256((folder / header["weights_file"]).read_bytes()).hexdigest()
    safetensors.torch.save_file(tensors, path, metadata={"raysparse": json.dumps(header)})
    rehash(folder)


def change_weights(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = safetensors.torch.load_file(folder / UNET)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / UNET, metadata={"format": "pt"})
    change_masks(folder, lambda header, masks: None)


def flip(path: Path, place: float = 0.7) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    path.write_bytes(data)


def masks_of_another(folder: Path) -> None:
    other = export.export(save(folder.parent / "o", trial(sparse=RIGL, seed=1)), folder.parent / "other")
    shutil.copy(other / "sparsity" / "masks.safetensors", folder / "sparsity" / "masks.safetensors")


def weights_of_another(folder: Path) -> None:
    other = export.export(save(folder.parent / "o", trial(sparse=RIGL, seed=1)), folder.parent / "other")
    shutil.copy(other / UNET, folder / UNET)


def edit_config(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "raysparse.json").read_text())["content"]
    seal(folder, config=content["config"] | changes)


FIRST = "mid_block.resnets.0.conv1.weight"  # sparse; many small layers are dense
HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no raysparse.json": (lambda f: (f / "raysparse.json").unlink(), r"no exported folder: it has no raysparse\.json"),
    "raysparse.json empty": (lambda f: (f / "raysparse.json").write_text(""), r"raysparse\.json is damaged"),
    "raysparse.json a list": (lambda f: (f / "raysparse.json").write_text("[]"), r"raysparse\.json is damaged"),
    "raysparse.json deep": (lambda f: (f / "raysparse.json").write_text("[" * 100_000), r"raysparse\.json is damaged"),
    "raysparse.json edited": (lambda f: flip(f / "raysparse.json", 0.5), r"raysparse\.json is damaged"),
    "not utf-8": (lambda f: (f / "raysparse.json").write_bytes(b"\xff\xfe"), r"raysparse\.json is damaged"),
    "of a later format": (lambda f: seal(f, format=2), "format: got 2"),
    "of no trial": (lambda f: seal(f, trial_id="../../etc"), "trial_id: got '../../etc'"),
    "of no step": (lambda f: seal(f, step=-1), "step: got -1"),
    "an unknown fact": (lambda f: seal(f, more=1), "unknown key 'more'"),
    "a config that is none": (lambda f: seal(f, config={"sead": 1}), "did you mean 'seed'"),
    "a config of another model": (lambda f: edit_config(f, model={"name": "ddpm_unet"}), "no weights of model"),
    "a config of a plain model": (
        lambda f: edit_config(f, model={"name": "chirodiff"}),
        r"model\.safetensors is damaged",
    ),
    "a model with wrong options": (
        lambda f: edit_config(f, model={"name": "latent_unet", "options": {"sise": 1}}),
        "options of model 'latent_unet'",
    ),
    "a huge model": (
        lambda f: edit_config(f, model={"name": "latent_unet", "options": {"block_out_channels": [8192] * 4}}),
        "no weights of model",
    ),
    "no weights": (lambda f: (f / UNET).unlink(), "diffusion_pytorch_model.safetensors is damaged"),
    "a bit of the weights": (lambda f: flip(f / UNET), "belongs to weights with sha256"),
    "weights truncated": (lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:999]), "belongs to weights with"),
    "masks of other weights": (masks_of_another, "belongs to weights with sha256 .* masks of another model"),
    "weights of other masks": (weights_of_another, "belongs to weights with sha256"),
    "no masks": (lambda f: shutil.rmtree(f / "sparsity"), r"masks\.safetensors is damaged \(No such file"),
    "a bit of the masks": (
        lambda f: flip(f / "sparsity" / "masks.safetensors", 0.99),
        r"masks\.safetensors is damaged",
    ),
    "masks truncated": (
        lambda f: (f / "sparsity" / "masks.safetensors").write_bytes(b"\x10\x00"),
        r"masks\.safetensors is damaged",
    ),
    "masks without a header": (
        lambda f: safetensors.torch.save_file({}, f / "sparsity" / "masks.safetensors"),
        "holds no masks of raysparse",
    ),
    "a config file of diffusers": (lambda f: flip(f / "unet" / "config.json", 0.5), r"config\.json is damaged"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "lacks scheduler/scheduler_config.json"),
    "a path out of the folder": (lambda f: seal(f, sha256={"../c/manifest.json": "0" * 64}), r"lacks \.\./c/manifest"),
    "an absolute path": (lambda f: seal(f, sha256={"/etc/passwd": "0" * 64}), "lacks /etc/passwd"),
    "no hashes": (lambda f: seal(f, sha256={}), "its sha256 is not the one"),
    "a mask missing": (
        lambda f: change_masks(f, lambda header, masks: masks.pop(FIRST)),
        "its header and its tensors differ in mid_block",
    ),
    "a mask too many": (
        lambda f: change_masks(
            f, lambda h, m: (m.update(x=m[FIRST].clone()), h["tensors"].update(x=h["tensors"][FIRST]))
        ),
        "masks of weights that the model does not have: 'unet.x'",
    ),
    "a mask of another shape": (
        lambda f: change_masks(f, lambda h, m: h["tensors"][FIRST].update(shape=[32, 288])),
        r"mask of 'unet.mid_block.resnets.0.conv1.weight' is bool \[32, 288\], its weight float32 \[32, 32, 3, 3\]",
    ),
    "a mask that says it is huge": (
        lambda f: change_masks(f, lambda h, m: h["tensors"][FIRST].update(shape=[2**40, 2**40])),
        "conv1.weight' is uint8",
    ),
    "a mask of negative shape": (
        lambda f: change_masks(f, lambda h, m: h["tensors"][FIRST].update(shape=[-16, -27])),
        r"has shape \[-16, -27\]",
    ),
    "a mask of floats": (
        lambda f: change_masks(f, lambda h, m: m.update({FIRST: m[FIRST].float()})),
        "conv1.weight' is float32",
    ),
    "a mask with other counts": (
        lambda f: change_masks(f, lambda h, m: h["tensors"][FIRST].update(active=1)),
        "active weights, its header says 1",
    ),
    "a mask's bit moved": (
        lambda f: change_masks(f, lambda h, m: m.update({FIRST: ~m[FIRST]}) or h["tensors"][FIRST].update(active=None)),
        "its header says None",
    ),
    "masks of another step": (lambda f: change_masks(f, lambda h, m: h.update(step=8)), "they are of two models"),
    "packed in another way": (lambda f: change_masks(f, lambda h, m: h.update(packing="?")), "this raysparse reads"),
    "a weight missing": (lambda f: change_weights(f, lambda w: w.pop("conv_in.bias")), "missing 'unet.conv_in.bias'"),
    "a weight too many": (lambda f: change_weights(f, lambda w: w.update(x=torch.zeros(1))), "unknown 'unet.x'"),
    "a weight of another shape": (
        lambda f: change_weights(f, lambda w: w.update({"conv_in.bias": torch.zeros(3)})),
        r"'unet.conv_in.bias' is float32 \[3\], the model's is float32 \[16\]",
    ),
    "a weight of another type": (
        lambda f: change_weights(f, lambda w: w.update({FIRST: w[FIRST].bfloat16()})),
        "is bfloat16",
    ),
    "a pruned weight that is not 0": (
        lambda f: change_weights(f, lambda w: w[FIRST].add_(1)),
        "conv1.weight' is not 0 outside its mask",
    ),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("exported")
    return export.export(save(place / "c", trial(sparse=RIGL)), place / "out")


@pytest.mark.parametrize("wrong", HOSTILE)
def test_what_is_wrong_is_refused_and_nothing_written(tmp_path, exported, wrong):
    change, message = HOSTILE[wrong]
    folder = tmp_path / "out"
    shutil.copytree(exported, folder)
    change(folder)
    with pytest.raises(UsageError, match=message):
        export.import_(folder, tmp_path / "back")
    assert not any(path.name.lstrip(".").startswith("back") for path in tmp_path.iterdir())


def test_the_hostile_folders_are_right_before_they_are_changed(tmp_path, exported):
    folder = tmp_path / "out"
    shutil.copytree(exported, folder)
    change_weights(folder, lambda weights: None)
    assert restored.load(export.import_(folder, tmp_path / "back")).masks


def test_a_first_stage_that_is_missing_or_changed_is_refused(tmp_path):
    folder = export.export(save(tmp_path / "c", trial(first_stage=FIRST_STAGE)), tmp_path / "out")
    flip(folder / "vqvae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UsageError, match=r"vqvae/diffusion_pytorch_model\.safetensors is damaged"):
        export.import_(folder, tmp_path / "back")
    shutil.rmtree(folder / "vqvae")
    rest = json.loads((folder / "raysparse.json").read_text())["content"]["sha256"]
    seal(folder, sha256={name: digest for name, digest in rest.items() if not name.startswith("vqvae")})
    with pytest.raises(UsageError, match=r"lacks vqvae/config\.json"):
        export.import_(folder, tmp_path / "back")


def test_a_folder_of_plain_diffusers_is_no_exported_one(tmp_path, exported):
    from diffusers import UNet2DModel

    UNet2DModel.from_pretrained(exported / "unet").save_pretrained(tmp_path / "unet")
    with pytest.raises(UsageError, match="no exported folder"):
        export.import_(tmp_path / "unet", tmp_path / "back")


# The commands


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["raysparse", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


def test_the_commands_export_and_import(run, tmp_path):
    checkpoint = in_results(tmp_path / "r", trial(sparse=RIGL))
    code, out, _ = run("export", tmp_path / "r", "--to", tmp_path / "out")
    assert (code, out) == (0, f"{tmp_path / 'out'}\n")
    code, out, _ = run("import", tmp_path / "out", "--to", tmp_path / "back")
    assert (code, out) == (0, f"{tmp_path / 'back'}\n")
    first, back = restored.load(checkpoint), restored.load(tmp_path / "back")
    assert bits(back.model.state_dict()) == bits(first.model.state_dict())


def test_their_mistakes_are_told_without_a_traceback(run, tmp_path, exported):
    for words, message in (
        (["export", tmp_path / "absent", "--to", tmp_path / "out"], "is absent"),
        (["export", exported, "--to", tmp_path / "out"], "raysparse import"),
        (["export", exported], "--to"),
        (["import", tmp_path, "--to", tmp_path / "out"], "no exported folder"),
        (["import", exported, "--to", exported], "is not empty"),
        (["import", exported, "--to", exported / "README.md" / "x"], "cannot write"),
    ):
        code, out, err = run(*words)
        assert (code, out) == (2, "")
        assert message in err
        assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
