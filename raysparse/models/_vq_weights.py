"""Trained weights of a first stage from where they are published: diffusers folders, Hub ids, CompVis checkpoints.

Nothing in a file is executed: safetensors, or torch.load with weights_only. Every key must find its place.
"""

from __future__ import annotations

import inspect
import json
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raysparse.errors import UsageError
from raysparse.models.autoencoder import Config, arguments

SUBFOLDERS = ("", "vqvae", "vae")  # of a pipeline's folder; LDMPipeline's is vqvae
FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

# Of a VQModel's config.json: what does not change the function of the weights as they are used here.
WITHOUT_EFFECT = {"sample_size", "scaling_factor", "lookup_from_codebook", "force_upcast"}
# Names of attention's layers before diffusers .14, as the published ldm-celebahq-256 has them.
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
# Keys of a CompVis checkpoint that are of its training: LPIPS and the discriminator.
OF_TRAINING = ("loss.", "discriminator.")
# A CompVis checkpoint is Lightning's and may mention these packages' classes beside the weights.
INERT_PACKAGES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.")


def read(weights: str, config: Config, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a VQModel, float32. wanted: name -> a tensor of the right shape (meta will do). UsageError."""
    path = Path(weights).expanduser()
    if path.is_file() and path.name in FILES:
        path = path.parent
    if path.is_dir():
        return _from_folder(path, config, wanted)
    if path.is_file():
        tensors = _state(_load(path), path)
        given = {name: tensor for name, tensor in tensors.items() if not name.startswith(OF_TRAINING)}
        levels = len(config.block_out_channels)
        return _placed(wanted, given, lambda name: compvis_name(name, levels), str(path), _advice(given))
    if HUB_ID.fullmatch(weights):
        return _from_folder(_from_hub(weights), config, wanted)
    raise UsageError(
        f"first_stage.weights {weights!r} is no file, folder or Hub id; give a folder of diffusers, a CompVis "
        "model.ckpt, or an id such as CompVis/ldm-celebahq-256"
    )


def compvis_name(name: str, levels: int) -> str:
    """The original's name of a parameter of diffusers' VQModel with so many levels.

    encoder.down_blocks.0.resnets.1.conv_shortcut.weight is encoder.down.0.block.1.nin_shortcut.weight there; the
    decoder's levels count from the finest there and from the coarsest here.
    """
    up = re.match(r"decoder\.up_blocks\.(\d+)\.", name)
    if up:
        name = f"decoder.up.{levels - 1 - int(up[1])}.{name[up.end() :]}"
    middle = re.match(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d+)\.", name)
    if middle:
        part = "block" if middle[2] == "resnets" else "attn"
        name = f"{middle[1]}.mid.{part}_{int(middle[3]) + 1}.{name[middle.end() :]}"
    for ours, theirs in (
        (".down_blocks.", ".down."),
        (".resnets.", ".block."),
        (".attentions.", ".attn."),
        (".downsamplers.0.", ".downsample."),
        (".upsamplers.0.", ".upsample."),
        (".conv_shortcut.", ".nin_shortcut."),
        (".conv_norm_out.", ".norm_out."),
        (".group_norm.", ".norm."),
        (".to_q.", ".q."),
        (".to_k.", ".k."),
        (".to_v.", ".v."),
        (".to_out.0.", ".proj_out."),
    ):
        name = name.replace(ours, theirs)
    return name


def _placed(
    wanted: Mapping[str, Tensor],
    given: Mapping[str, Any],
    name_of: Callable[[str], str],
    where: str,
    advice: str = "",
) -> dict[str, Tensor]:
    """`given` under our names, in our shapes. UsageError naming a key too few, too many or of another shape."""
    names = {ours: name_of(ours) for ours in wanted}
    missing = [theirs for theirs in names.values() if theirs not in given]
    extra = sorted(given.keys() - set(names.values()))
    if missing or extra:
        lacks = [f"lacks {_some(missing)}"] if missing else []
        has = [f"has {_some(extra)}, which the first stage has not"] if extra else []
        raise UsageError(f"{where} {' and '.join(lacks + has)}; {advice or 'give the weights of a VQModel'}")
    return {ours: _fitted(given[theirs], wanted[ours].shape, f"{where}: {theirs}") for ours, theirs in names.items()}


def _fitted(value: Any, shape: torch.Size, what: str) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.is_meta:
        raise UsageError(f"{what} is no tensor of numbers; get the file again")
    if value.ndim == 4 and len(shape) == 2 and value.shape[2:] == (1, 1):
        value = value[:, :, 0, 0]  # the original's attention is made of 1x1 convolutions
    if value.shape != shape:
        raise UsageError(
            f"{what} has shape {list(value.shape)}, the config's architecture {list(shape)}; set first_stage.options "
            "to what these weights are of"
        )
    if not bool(value.isfinite().all()):
        raise UsageError(f"{what} has values that are not finite; get the file again")
    numbers: Tensor = value.detach().to(torch.float32).contiguous()
    return numbers


def _some(names: Iterable[str]) -> str:
    first, *rest = sorted(names)
    return f"{first!r} and {len(rest)} more" if rest else repr(first)


def _advice(given: Mapping[str, Any]) -> str:
    if any(name.startswith("first_stage_model.") for name in given):
        return "it is a whole Latent Diffusion model; give the model.ckpt of its first stage alone (vq-f4.zip)"
    if any(".down_blocks." in name for name in given):
        return "its names are diffusers'; give the folder with its config.json"
    return "give the model.ckpt of a CompVis first stage, and set first_stage.options to its architecture"


def _from_folder(folder: Path, config: Config, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    places = [folder / name for name in SUBFOLDERS]
    place = next((place for place in places if (place / "config.json").is_file()), None)
    if place is None:
        raise UsageError(f"{folder} has no config.json, nor has its vqvae or vae; give a folder that diffusers saved")
    _check_architecture(place / "config.json", config)
    file = next((place / name for name in FILES if (place / name).is_file()), None)
    if file is None:
        raise UsageError(f"{place} has neither {FILES[0]} nor {FILES[1]}; save or download it again")
    tensors = _load(file)
    for old, new in OLD_ATTENTION.items():
        tensors = {name.replace(old, new): value for name, value in tensors.items()}
    return _placed(wanted, tensors, lambda name: name, str(file))


def _check_architecture(file: Path, config: Config) -> None:
    """UsageError where a folder's config.json describes another network; its scaling_factor is not read."""
    from diffusers import VQModel

    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{file} is no JSON ({error}); save or download it again") from error
    kind = said.get("_class_name") if isinstance(said, dict) else None
    if kind != "VQModel":
        raise UsageError(f"{file} is of a {kind or 'thing without _class_name'}; the first stage is a VQModel")
    defaults = {name: p.default for name, p in inspect.signature(VQModel.__init__).parameters.items()}
    expected = {name: _plain(value) for name, value in arguments(config).items() if name not in WITHOUT_EFFECT}
    found = {name: _plain(said.get(name, defaults.get(name))) for name in expected}
    if found["vq_embed_dim"] is None:
        found["vq_embed_dim"] = found["latent_channels"]
    unknown = {name for name in said if not name.startswith("_")} - expected.keys() - WITHOUT_EFFECT
    wrong = [
        f"{name} is {found[name]} there and {expected[name]} here" for name in expected if found[name] != expected[name]
    ]
    if wrong or unknown:
        wrong += [f"{name} is not known here" for name in sorted(unknown)]
        raise UsageError(f"{file} is of another architecture: {'; '.join(wrong)}. Set first_stage.options to it")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _from_hub(name: str) -> Path:
    """A local copy of a Hub repository's VQModel; only what is needed, and only once."""
    import huggingface_hub

    wanted = [f"{place}/{file}".lstrip("/") for place in SUBFOLDERS for file in ("config.json", *FILES)]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # its errors, its HTTP client's and the file system's have no common class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"first_stage.weights {name!r} is no file or folder here and could not be had from the Hub ({reason}); "
            "give the path of a downloaded copy"
        ) from error


def _state(loaded: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The weights of a CompVis checkpoint: Lightning keeps them under `state_dict`."""
    state = loaded.get("state_dict", loaded)
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise UsageError(f"{path} holds no state dict of named tensors; give the model.ckpt of a CompVis first stage")
    return dict(state)


def _load(path: Path) -> dict[str, Any]:
    """A file's mapping. UsageError: it holds something else than plain tensors, or is damaged."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        loaded = _plain_tensors(path)
    except UsageError:
        raise
    except Exception as error:  # safetensors' own class, and what torch raises for a file that is none of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"{path} could not be read as weights ({reason}); get the file again") from error
    if not isinstance(loaded, Mapping):
        raise UsageError(f"{path} holds a {type(loaded).__name__}, no weights by name; get the right file")
    return dict(loaded)


def _plain_tensors(path: Path) -> Any:
    """torch.load of tensors and plain containers, and of Lightning's own classes as objects that do nothing."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        strangers = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if not all(name.startswith(INERT_PACKAGES) for name in strangers):
        raise UsageError(
            f"{path} holds more than plain tensors (it names {_some(strangers)}), and code in a file is not run; where "
            "you trust it, load it with torch yourself and save its state_dict alone"
        )
    with torch.serialization.safe_globals([(_Inert, name) for name in strangers]):
        return torch.load(path, map_location="cpu", weights_only=True)


class _Inert:
    """Stands for a class of Lightning's that a checkpoint mentions; whatever it is given, it forgets."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass
