"""Export: plain diffusers makes the same samples. Import: the same bits, or a refusal."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import yaml
from train_checkpoints import FIRST_STAGE, RIGL, STEP, in_results, save, trial

from raysparse import cli, results
from raysparse.diffusion import ddim
from raysparse.diffusion.guidance import guided
from raysparse.diffusion.schedule import NoiseSchedule
from raysparse.errors import UsageError
from raysparse.metrics.protocol import Protocol
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
    pictures = FirstStage.of(config.first_stage).decode(latents)
    assert theirs.shape == (2, 16, 16, 3)
    assert np.abs(pictures.permute(0, 2, 3, 1).numpy() / 255 - theirs).max() <= 0.5 / 255 + 1e-4  # uint8 rounds
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


def test_the_originals_150_steps_are_told_to_have_no_scheduler(tmp_path):
    config = trial(evaluate__ddim_steps=150)
    card = (export.export(save(tmp_path / "c", config), tmp_path / "out") / "README.md").read_text()
    assert "asked for 150 steps ('original') raysparse does 167" in card
    assert "is among them" not in card


@SPARSE
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("latent_unet", {}),
        ("latent_unet", {"first_stage": FIRST_STAGE}),
        ("latent_unet", {"model__options__num_classes": 4, "model__options__context_dim": 16}),
        ("ddpm_unet", {"train__channels_last": True}),
        ("chirodiff", {}),
    ],
    ids=["pixels", "latents", "classes", "channels_last", "sketches"],
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


def bits(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.contiguous().numpy().tobytes() for name, tensor in state.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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


def record(path: Path, trial_id: str, ddim_steps: int, fids: dict[int, float]) -> None:
    """A trial's records with these FIDs by step."""
    hints = dict.fromkeys((field for field in results.Facts.__dataclass_fields__), 0.0)
    numbers = {name: 1e12 for name in hints if name.startswith("flops")} | {"flops_train_paper": 4.5e11}
    words = dict.fromkeys(("sweep", "model", "dataset", "allocation", "config", "versions", "command"), "x")
    protocol = Protocol("inception", "h", "2048", 10_000, 12_500, "r", "bilinear 299", ddim_steps, eta=0.0, ema=True)
    counts = dict.fromkeys(
        ("seed", "update_interval_steps", "total_steps", "batch_size", "world_size", "params_total", "params_active"), 1
    )
    facts = results.Facts(
        **hints
        | numbers
        | words
        | counts
        | {"trial_id": trial_id, "stage": "single", "method": "rigl", "protocol": protocol.json()}
    )
    empty = dict.fromkeys(results.Report.__dataclass_fields__, 0.0)
    rest = {"samples_png": b"x", "layer_density": "{}", "topology_updates": 0, "peak_memory_bytes": 1, "reason": None}
    reports = [
        results.Report(**empty | rest | {"diverged": False, "step": step, "fid": fid, "kid": 0.012, "kid_std": 0.001})
        for step, fid in fids.items()
    ]
    results.write_table(path, facts, results.Outcome("COMPLETED"), reports)


def test_the_card_says_what_was_measured_at_this_step(tmp_path):
    config = trial(sparse=RIGL)
    checkpoint = in_results(tmp_path / "r", config)
    for path, ddim_steps, fids in (
        (f"records/{config.trial_id}.parquet", 50, {STEP - 1: 99.5, STEP: 12.25, STEP + 1: 88.5}),
        (f"evaluations/{config.trial_id}-0.parquet", 20, {STEP: 13.75, STEP + 1: 77.5}),
        (f"evaluations/{config.trial_id}-1.parquet", 50, {STEP: 12.25}),  # again under the trial's own protocol
        ("evaluations/rigl-0123456789-0.parquet", 20, {STEP: 66.5}),  # another trial's
    ):
        record(tmp_path / "r" / path, config.trial_id, ddim_steps, fids)
    folder = export.export(tmp_path / "r", tmp_path / "out")
    text = (folder / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    head = yaml.safe_load(head)
    assert head["library_name"] == "diffusers"
    fid, kid, *other = head["model-index"][0]["results"][0]["metrics"]
    assert (fid["type"], fid["value"], kid["type"], kid["value"]) == ("fid", 12.25, "kid", 0.012)
    assert "10000 samples against 12500 examples, DDIM 50 steps, leading timesteps" in fid["name"]
    assert "| 12.25 | 0.012 ± 0.001 |" in body
    assert [metric["value"] for metric in other] == [13.75, 0.012]
    assert "DDIM 20 steps" in other[0]["name"]
    assert not any(fid in text for fid in ("99.5", "88.5", "77.5", "66.5"))
    assert body.count("| 12.25 |") == 1
    for told in ("rigl", "S = 0.5", "0.5 |", "800 steps", "| seed | 0 |", "7 of 40,800", "4.5000e+11", "0.4500"):
        assert told in body
    active = sum(int((p != 0).sum()) for p in restored.load(checkpoint).model.parameters())
    count = int(re.search(r"\| active \| ([\d,]+) \|", body)[1].replace(",", ""))
    assert active <= count <= active + 2 * len(restored.load(checkpoint).masks)  # each layer has two active zeros
    again = export.export(export.import_(folder, tmp_path / "back"), tmp_path / "again")
    assert (again / "README.md").read_text() == text


def test_without_a_record_nothing_is_said_to_be_measured(tmp_path):
    card = (export.export(save(tmp_path / "c", trial(sparse=RIGL)), tmp_path / "out") / "README.md").read_text()
    assert "FID and KID: not measured" in card
    assert "model-index" not in card


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
        lambda f: edit_config(f, model={"name": "latent_unet", "options": {"block_out_channels": [32 * 10**4] * 4}}),
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
