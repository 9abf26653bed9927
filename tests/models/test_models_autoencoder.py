from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from raysparse import rng
from raysparse.errors import UsageError
from raysparse.models._vq_weights import compvis_name
from raysparse.models.autoencoder import SMALL, Autoencoder, Config, build, identity, load

SMALL_CONFIG = Config(**SMALL)
VQ_F8 = Config(
    block_out_channels=(128, 256, 256, 512),
    attention_levels=(False, False, False, True),
    latent_channels=4,
    vq_embed_dim=4,
    num_vq_embeddings=16384,
)


def pictures(count: int = 2, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=rng.generator(0, "pictures")) * 2 - 1


def assert_same(loaded: Autoencoder, model: Autoencoder) -> None:
    x = pictures()
    assert torch.equal(loaded.encode(x), model.encode(x))
    assert torch.equal(loaded.decode(model.encode(x)), model.decode(model.encode(x)))
    assert identity(loaded) == identity(model)


# --- CompVis' own names, written down from ldm/modules/diffusionmodules/model.py and nothing of raysparse


def original_shapes(
    ch: int, multiples: tuple[int, ...], blocks: int, attends: tuple[bool, ...], z: int, embed: int, codes: int
) -> dict[str, tuple[int, ...]]:
    """Key -> shape of the state dict of CompVis' VQModel without its loss."""

    def convolution(name: str, n_in: int, n_out: int, kernel: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (n_out, n_in, kernel, kernel)
        yield f"{name}.bias", (n_out,)

    def norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (width,)
        yield f"{name}.bias", (width,)

    def block(name: str, n_in: int, n_out: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from norm(f"{name}.norm1", n_in)
        yield from convolution(f"{name}.conv1", n_in, n_out, 3)
        yield from norm(f"{name}.norm2", n_out)
        yield from convolution(f"{name}.conv2", n_out, n_out, 3)
        if n_in != n_out:
            yield from convolution(f"{name}.nin_shortcut", n_in, n_out, 1)

    def attention(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            yield from convolution(f"{name}.{part}", width, width, 1)

    def middle(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from block(f"{name}.mid.block_1", width, width)
        yield from attention(f"{name}.mid.attn_1", width)
        yield from block(f"{name}.mid.block_2", width, width)

    def whole() -> Iterator[tuple[str, tuple[int, ...]]]:
        widths = [ch * multiple for multiple in multiples]
        yield from convolution("encoder.conv_in", 3, ch, 3)
        width = ch
        for level, wide in enumerate(widths):
            for index in range(blocks):
                yield from block(f"encoder.down.{level}.block.{index}", width, wide)
                width = wide
                if attends[level]:
                    yield from attention(f"encoder.down.{level}.attn.{index}", wide)
            if level < len(widths) - 1:
                yield from convolution(f"encoder.down.{level}.downsample.conv", wide, wide, 3)
        yield from middle("encoder", width)
        yield from norm("encoder.norm_out", width)
        yield from convolution("encoder.conv_out", width, z, 3)
        yield from convolution("decoder.conv_in", z, width, 3)
        yield from middle("decoder", width)
        for level, wide in reversed(list(enumerate(widths))):
            for index in range(blocks + 1):
                yield from block(f"decoder.up.{level}.block.{index}", width, wide)
                width = wide
                if attends[level]:
                    yield from attention(f"decoder.up.{level}.attn.{index}", wide)
            if level:
                yield from convolution(f"decoder.up.{level}.upsample.conv", wide, wide, 3)
        yield from norm("decoder.norm_out", width)
        yield from convolution("decoder.conv_out", width, 3, 3)
        yield "quantize.embedding.weight", (codes, embed)
        yield from convolution("quant_conv", z, embed, 1)
        yield from convolution("post_quant_conv", embed, z, 1)

    return dict(whole())


@pytest.mark.parametrize(
    ("config", "original", "count"),
    [
        (Config(), original_shapes(128, (1, 2, 4), 2, (False,) * 3, 3, 3, 8192), 55_322_782),
        (VQ_F8, original_shapes(128, (1, 2, 2, 4), 2, (False, False, False, True), 4, 4, 16384), None),
    ],
    ids=["vq-f4", "vq-f8"],
)
def test_every_key_of_the_original_has_its_place(
    config: Config, original: dict[str, tuple[int, ...]], count: int | None
) -> None:
    with torch.device("meta"):
        model = build(config, seed=0)
    if count is not None:
        assert sum(p.numel() for p in model.parameters()) == count
    found = {compvis_name(name, len(config.block_out_channels)): p for name, p in model.vq.state_dict().items()}
    assert found.keys() == original.keys()
    for name, tensor in found.items():
        assert original[name] in (tuple(tensor.shape), (*tensor.shape, 1, 1)), name


# --- loading


def original_state(model: Autoencoder) -> dict[str, Tensor]:
    """A model's weights as CompVis keeps them: its names, attention as 1x1 convolutions."""
    names = original_shapes(8, (1, 2), 1, (False, False), 3, 3, 32)
    ours = {compvis_name(name, 2): tensor for name, tensor in model.vq.state_dict().items()}
    return {name: ours[name].reshape(shape).clone() for name, shape in names.items()}


def training_state() -> dict[str, Tensor]:
    """What a CompVis checkpoint holds beside the first stage: its perceptual loss and its discriminator."""
    names = ("loss.perceptual_loss.net.slice1.0.weight", "loss.discriminator.main.0.weight", "discriminator.x")
    return {name: torch.zeros(2) for name in names}


def test_a_compvis_checkpoint(tmp_path: Path) -> None:
    model, file = build(SMALL_CONFIG, seed=5), tmp_path / "model.ckpt"
    torch.save({"epoch": 3, "global_step": 7, "state_dict": original_state(model) | training_state()}, file)
    loaded = load(str(file), SMALL_CONFIG)
    assert_same(loaded, model)
    assert not any(p.requires_grad for p in loaded.parameters())
    torch.save(original_state(model), file)  # a bare state dict
    assert_same(load(str(file), SMALL_CONFIG), model)


def test_missing_extra_and_misshapen_keys_are_named(tmp_path: Path) -> None:
    model, file = build(SMALL_CONFIG, seed=5), tmp_path / "model.ckpt"

    def refused(change: Callable[[dict[str, Any]], Any], message: str) -> None:
        state = original_state(model)
        change(state)
        torch.save({"state_dict": state}, file)
        with pytest.raises(UsageError, match=message):
            load(str(file), SMALL_CONFIG)

    refused(lambda s: s.pop("decoder.up.1.upsample.conv.bias"), r"lacks 'decoder\.up\.1\.upsample\.conv\.bias';")
    refused(lambda s: s.update({"colorize": torch.zeros(3)}), "has 'colorize', which the first stage has not")
    refused(lambda s: s.update({"model_ema.decay": torch.zeros(3)}), r"has 'model_ema\.decay'")
    refused(lambda s: s.update({"quantize.embedding.weight": torch.zeros(64, 3)}), r"quantize.*\[64, 3\].*\[32, 3\]")
    refused(lambda s: s.update({"quant_conv.bias": torch.full((3,), torch.nan)}), r"quant_conv\.bias .*not finite")
    refused(lambda s: s.update({"quant_conv.bias": "text"}), r"quant_conv\.bias is no tensor")

    def whole_model(state: dict[str, Any]) -> None:
        for name in list(state):
            state[f"first_stage_model.{name}"] = state.pop(name)

    refused(whole_model, r"lacks 'decoder.* and \d+ more and has 'first_stage_model.*first stage alone")


class Planted:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("planted"),))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = build(SMALL_CONFIG, seed=5)
    torch.save({"state_dict": original_state(model), "callbacks": Planted()}, tmp_path / "model.ckpt")
    with pytest.raises(UsageError, match=r"more than plain tensors .*getattr.* code in a file is not run"):
        load("model.ckpt", SMALL_CONFIG)
    assert not (tmp_path / "planted").exists()


def test_the_classes_that_lightning_leaves_in_a_checkpoint_do_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CompVis' checkpoints name pytorch_lightning's callbacks, which are not installed here; the weights are plain."""
    monkeypatch.chdir(tmp_path)
    model, file = build(SMALL_CONFIG, seed=5), tmp_path / "model.ckpt"
    package = ModuleType("pytorch_lightning.callbacks")

    class ModelCheckpoint:
        def __setstate__(self, state: Any) -> None:
            Path("planted").touch()

    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = package.__name__, "ModelCheckpoint"
    package.ModelCheckpoint = ModelCheckpoint  # type: ignore[attr-defined]
    called = ModelCheckpoint()
    called.best = 0.5  # type: ignore[attr-defined]
    with monkeypatch.context() as installed:
        installed.setitem(sys.modules, "pytorch_lightning", ModuleType("pytorch_lightning"))
        installed.setitem(sys.modules, package.__name__, package)
        torch.save({"state_dict": original_state(model), "callbacks": {ModelCheckpoint: called}}, file)
        torch.load(file, weights_only=False)
    assert (tmp_path / "planted").exists()  # so there is something to run
    (tmp_path / "planted").unlink()
    assert_same(load(str(file), SMALL_CONFIG), model)
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps([1, 2])], ids=["empty", "text", "list"])
def test_what_is_no_checkpoint_is_the_users_error(content: bytes, tmp_path: Path) -> None:
    for name in ("model.ckpt", "model.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=name):
            load(str(tmp_path / name), SMALL_CONFIG)
    torch.save([torch.zeros(2)], tmp_path / "model.ckpt")
    with pytest.raises(UsageError, match="holds a list"):
        load(str(tmp_path / "model.ckpt"), SMALL_CONFIG)


def saved(model: Autoencoder, folder: Path, **changes: Any) -> Path:
    """As plain diffusers saves it, then with changes to its config.json; None drops a key."""
    model.vq.save_pretrained(folder)
    file = folder / "config.json"
    said = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in said.items() if value is not None}))
    return folder


@pytest.mark.parametrize("scaling", [None, 0.18215])
def test_a_folder_of_diffusers_whatever_its_scaling_factor(scaling: float | None, tmp_path: Path) -> None:
    model = build(SMALL_CONFIG, seed=5)
    folder = saved(model, tmp_path, scaling_factor=scaling)
    assert_same(load(str(folder), SMALL_CONFIG), model)
    assert_same(load(str(folder / "diffusion_pytorch_model.safetensors"), SMALL_CONFIG), model)


@pytest.mark.parametrize("name", ["vqvae", "vae"])
def test_a_pipeline_of_diffusers(name: str, tmp_path: Path) -> None:
    model = build(SMALL_CONFIG, seed=5)
    saved(model, tmp_path / name)
    (tmp_path / "model_index.json").write_text("{}")
    assert_same(load(str(tmp_path), SMALL_CONFIG), model)


def test_an_old_folder_with_old_names(tmp_path: Path) -> None:
    """ldm-celebahq-256 was published as .bin with attention's names of then."""
    model = build(SMALL_CONFIG, seed=5)
    folder = saved(model, tmp_path)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = model.vq.state_dict()
    for new, then in old.items():
        state = {key.replace(f".{new}.", f".{then}."): value for key, value in state.items()}
    assert any(".proj_attn." in key for key in state)
    torch.save(state, folder / "diffusion_pytorch_model.bin")
    assert_same(load(str(folder), SMALL_CONFIG), model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_vq_embeddings": 64}, "num_vq_embeddings is 64 there and 32 here"),
        ({"block_out_channels": [8, 32]}, r"block_out_channels is \[8, 32\] there and \[8, 16\] here"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention is False there"),
        ({"act_fn": "relu"}, "act_fn is relu there"),
        ({"spectral_norm": True}, "spectral_norm is not known here"),
        ({"_class_name": "AutoencoderKL"}, "is of a AutoencoderKL"),
    ],
)
def test_a_folder_of_another_architecture(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = saved(build(SMALL_CONFIG, seed=5), tmp_path, **changes)
    with pytest.raises(UsageError, match=message):
        load(str(folder), SMALL_CONFIG)


def test_a_broken_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no config\.json"):
        load(str(tmp_path), SMALL_CONFIG)
    folder = saved(build(SMALL_CONFIG, seed=5), tmp_path)
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UsageError, match="could not be read as weights"):
        load(str(folder), SMALL_CONFIG)
    weights.unlink()
    with pytest.raises(UsageError, match="has neither"):
        load(str(folder), SMALL_CONFIG)
    (folder / "config.json").write_text("{")
    with pytest.raises(UsageError, match="is no JSON"):
        load(str(folder), SMALL_CONFIG)


def test_a_hub_id_from_the_cache_and_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match=r"'somebody/vq-f4' .* could not be had from the Hub"):
        load("somebody/vq-f4", SMALL_CONFIG)
    model, revision = build(SMALL_CONFIG, seed=5), "0" * 40
    cached = tmp_path / "models--somebody--vq-f4"
    saved(model, cached / "snapshots" / revision / "vqvae")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)
    assert_same(load("somebody/vq-f4", SMALL_CONFIG), model)
    with pytest.raises(UsageError, match="is no file, folder or Hub id"):
        load("model.ckpt", SMALL_CONFIG)


# --- what it computes


def test_encoding_does_not_quantise_and_decoding_does() -> None:
    model = build(SMALL_CONFIG, seed=5)
    z = model.encode(pictures())
    codebook = model.vq.quantize.embedding.weight
    rows = z.permute(0, 2, 3, 1).reshape(-1, 3)
    nearest = codebook[(rows[:, None] - codebook).square().sum(-1).argmin(1)]
    assert (rows - nearest).norm(dim=1).min() > 1e-3
    quantised = nearest.view(2, 8, 8, 3).permute(0, 3, 1, 2)
    assert torch.allclose(model.decode(z), model.decode(quantised), atol=1e-5)
    assert torch.allclose(model.decode(z), model.vq.decode(z).sample, atol=1e-5)
    assert not torch.allclose(model.decode(z), model.vq.decode(z, force_not_quantize=True).sample, atol=1e-3)


def test_the_scaling_factor_is_taken_back() -> None:
    plain, scaled = build(SMALL_CONFIG, seed=5), build(Config(**SMALL, scaling_factor=0.5), seed=5)
    x = pictures()
    assert torch.equal(scaled.encode(x), plain.encode(x) / 2)
    assert torch.equal(scaled.decode(scaled.encode(x)), plain.decode(plain.encode(x)))
    assert identity(scaled) != identity(plain)


def test_structure_of_the_original() -> None:
    with torch.device("meta"):
        network = build(Config(), seed=0).vq
    norms = [m for m in network.modules() if isinstance(m, nn.GroupNorm)]
    assert {(m.num_groups, m.eps) for m in norms} == {(32, 1e-6)}
    assert [(m.heads, m.to_q.in_features) for m in network.modules() if hasattr(m, "to_q")] == [(1, 512)] * 2


def test_shapes_that_do_not_fit_are_the_users_error() -> None:
    model = build(SMALL_CONFIG, seed=5)
    for shape in ((2, 1, 16, 16), (2, 3, 15, 16), (3, 16, 16)):
        with pytest.raises(UsageError, match="multiples of 2"):
            model.encode(torch.zeros(shape))
    with pytest.raises(UsageError, match=r"decodes latents \[B, 3, h, w\]"):
        model.decode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValidationError, match="attention_levels has 3 entries"):
        Config(block_out_channels=(32, 64))
