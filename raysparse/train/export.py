"""Trained models as folders that others can load, and back.

    DIR/unet/ scheduler/ vqvae/ model_index.json   what plain diffusers loads (diffusers_parts.py); a model that
                                                   diffusers does not have is model.safetensors instead
        sparsity/masks.safetensors                 which weights are active (bitmasks.py)
        raysparse.json                             the trial, the step, what was measured, sha256 of each file
        README.md                                  the model card

Weights are written and read bit for bit and nothing is pickled, so an import is the model that was exported.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from raysparse import config as configs
from raysparse import files, plugins
from raysparse.config import TrialConfig
from raysparse.errors import UsageError, usage_error_from
from raysparse.train import bitmasks, checks, diffusers_parts, measured, model_card, restored, state
from raysparse.train.folders import new_folder
from raysparse.train.measured import Measured

MASKS = "sparsity/masks.safetensors"
CARD = "README.md"  # the one file that may be edited: it has no hash
_UNHASHED = (CARD, restored.EXPORTED)


class _Content(BaseModel):
    """What raysparse.json says, in `content` beside the sha256 of that."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1]  # of the folder; another one is of another raysparse
    trial_id: str = Field(pattern=r"^\w+-[0-9a-f]{10}$")
    step: int = Field(ge=0)
    config: dict[str, Any]  # TrialConfig, without the paths of the machine that wrote it
    facts: Measured
    sha256: dict[str, str]  # of each file but this one and the card, by its path with slashes


def export(checkpoint: Path, to: Path, *, first_stage: str | None = None) -> Path:
    """Write the averaged, masked model of `checkpoint` (whatever restored.load takes) to the new folder `to`.

    first_stage: where its weights are now, instead of where the trial's settings say: a diffusers folder, a Hub id or a
    CompVis model.ckpt. UsageError: no such checkpoint, `to` is not empty, first-stage weights that are not there or not
    the ones that the settings name by sha256. `to` is whole or absent.
    """
    model = restored.load(checkpoint)
    if model.network is not model.model:
        raise UsageError(
            f"trial {model.trial_id} has a mask per range of timesteps ({model.config.sparse.setting('ranges')}), "
            "which a folder of one set of masked weights cannot hold; sample it with `raysparse sample` instead"
        )
    stage, identity = _first_stage(model, first_stage)
    facts = measured.of(model)
    with new_folder(to) as folder:
        diffusers_parts.save_network(model.model, folder)
        if stage is not None:
            diffusers_parts.save_first_stage(stage, folder)
        unet = None
        if diffusers_parts.is_diffusers(model.model):
            unet = diffusers_parts.unet_class(model.model)
            diffusers_parts.save_pipeline(model.config, folder, unet, stage is not None)
        _write_masks(model, folder)
        card = model_card.render(
            model.config,
            trial_id=model.trial_id,
            step=model.step,
            measured=facts,
            unet=unet,
            pipeline=None if unet is None else diffusers_parts.pipeline_of(unet, stage is not None),
            first_stage=identity,
            equal_steps=[] if unet is None else diffusers_parts.equal_steps(model.config),
        )
        (folder / CARD).write_text(card, encoding="utf-8")
        content = _Content(
            format=1,
            trial_id=model.trial_id,
            step=model.step,
            config=_without_paths(model.config, identity),
            facts=facts,
            sha256={name: files.sha256(folder / name) for name in _names(folder)},
        ).model_dump(mode="json")
        text = json.dumps({"content": content, "sha256": _seal(content)}, sort_keys=True, indent=1)
        (folder / restored.EXPORTED).write_text(text + "\n", encoding="utf-8")
    return to


def import_(folder: Path, to: Path) -> Path:
    """Write an exported folder to `to`, a new one that `restored.load` reads: weights and masks are the same bits.

    UsageError: no exported folder, a file that is missing, damaged or altered, masks of other weights or shapes,
    tensors that are not the model's, `to` is not empty. `to` is whole or absent.
    """
    content = _content(folder)
    trial = configs.parse(content.config, f"config of {folder / restored.EXPORTED}")
    with torch.device("meta"):
        outline = plugins.load("models", trial.model.name).build(checks.model_options(trial), seed=trial.seed)
    places = diffusers_parts.weight_files(outline)
    masks = _read_masks(folder, next(iter(places.items())), content)
    _check_files(folder, content.sha256, [MASKS, *places, *_first_stage_files(trial)])
    weights = {prefix + name: tensor for file, prefix in places.items() for name, tensor in _tensors(folder / file)}
    restored.model_of(trial, weights, masks, str(folder))  # that they fit, before anything is written
    facts = content.model_dump(mode="json", include={"trial_id", "step", "config", "facts"})
    with new_folder(to) as temporary:
        state.write(temporary, {"ema": weights, "engine": {"engine": {"masks": masks}}}, facts)
        for name in _first_stage_files(trial):
            (temporary / restored.FIRST_STAGE).mkdir(exist_ok=True)
            shutil.copyfile(folder / name, temporary / restored.FIRST_STAGE / Path(name).name)
    return to


def _first_stage(model: restored.Restored, weights: str | None) -> tuple[nn.Module | None, str | None]:
    """diffusers' VQModel of a trial's first stage, and its identity; None for a model of pixels or sketches."""
    settings = model.config.first_stage
    if settings is None:
        if weights is not None:
            raise UsageError(f"trial {model.trial_id} has no first stage; leave --first-stage out")
        return None, None
    from raysparse.train.first_stage import FirstStage

    if weights is not None:
        settings = settings.model_copy(update={"weights": weights})
    stage = FirstStage.of(settings)  # checks the options and the sha256
    module = plugins.load("models", settings.name)
    options = module.Config.model_validate(dict(settings.options))
    random = stage.config.weights is None
    network = module.build(options, seed=0) if random else module.load(stage.config.weights, options)
    assert module.identity(network) == stage.identity
    return network.vq, stage.identity


def _first_stage_files(trial: TrialConfig) -> list[str]:
    if trial.first_stage is None:
        return []
    return [f"{diffusers_parts.FIRST_STAGE}/{name}" for name in diffusers_parts.MODEL_FILES]


def _without_paths(config: TrialConfig, identity: str | None) -> dict[str, Any]:
    """The settings as JSON, without paths of this machine; the first stage, which is in the folder, by its identity."""
    content: dict[str, Any] = json.loads(config.dump_json())
    for section, name in configs.PATHS:
        content[section][name] = None
    if config.sparse.setting("teacher") is not None:  # not None: its loss or its start say that there was one
        content["sparse"]["teacher"] = configs.LEFT_OUT
    if identity is not None:
        content["first_stage"] |= {"weights": None, "sha256": identity}
    return content


def _write_masks(model: restored.Restored, folder: Path) -> None:
    file = next(iter(diffusers_parts.weight_files(model.model)))
    names = diffusers_parts.mask_names(model.masks, model.model)
    facts = {
        "method": model.config.sparse.method,
        "sparsity": model.config.sparse.sparsity or 0.0,
        "step": model.step,
        "trial_id": model.trial_id,
        "weights_file": file,
        "weights_sha256": files.sha256(folder / file),
    }
    (folder / MASKS).parent.mkdir()
    bitmasks.save(folder / MASKS, {names[name]: mask for name, mask in model.masks.items()}, facts)


def _read_masks(folder: Path, place: tuple[str, str], content: _Content) -> dict[str, Tensor]:
    """Masks by parameter name. UsageError where they are of other weights than those beside them."""
    file, prefix = place
    path = folder / MASKS
    masks, header = bitmasks.load(path)
    if header["weights_sha256"] != (found := _sha256(folder / file)):
        raise UsageError(
            f"{path} belongs to weights with sha256 {header['weights_sha256']}, but {folder / file} has {found}: the "
            "weights were changed, or these are the masks of another model; export the checkpoint again"
        )
    theirs, ours = (header.get("trial_id"), header.get("step")), (content.trial_id, content.step)
    if theirs != ours:
        raise UsageError(f"{path} is of trial and step {theirs}, {restored.EXPORTED} of {ours}: they are of two models")
    return {prefix + name: mask for name, mask in masks.items()}


def _content(folder: Path) -> _Content:
    """What raysparse.json says. UsageError where it is missing, altered, or of another format."""
    path = folder / restored.EXPORTED
    if not path.is_file():
        raise UsageError(f"{folder} is no exported folder: it has no {path.name} (`raysparse export` makes them)")
    try:
        outer = json.loads(path.read_text(encoding="utf-8"))
        content = outer["content"]
        intact = outer["sha256"] == _seal(content)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise bitmasks.damaged(path, f"it cannot be read: {error}") from error
    if not intact:
        raise bitmasks.damaged(path, "its sha256 does not match: it was edited")
    try:
        return _Content.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise usage_error_from(error, str(path), _Content) from None


def _check_files(folder: Path, hashes: Mapping[str, str], names: Sequence[str]) -> None:
    """That every file is as it was written. Only what a search of the folder finds is opened, not what a text names."""
    found = _names(folder)
    needed = {*names, *hashes}
    if missing := sorted(needed - set(found)):
        raise UsageError(f"{folder} lacks {', '.join(missing)}; get it again, or export the checkpoint again")
    for name in sorted(needed):
        if _sha256(folder / name) != hashes.get(name):
            raise bitmasks.damaged(folder / name, "its sha256 is not the one in raysparse.json: it was changed")


def _tensors(path: Path) -> list[tuple[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return list(load_file(path).items())
    except (OSError, SafetensorError) as error:
        raise bitmasks.damaged(path, str(error)) from error


def _names(folder: Path) -> list[str]:
    """The files of an exported folder but the two without a hash, as posix paths, sorted."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(name for path in found if (name := path.relative_to(folder).as_posix()) not in _UNHASHED)


def _sha256(path: Path) -> str:
    try:
        return files.sha256(path)
    except OSError as error:
        raise bitmasks.damaged(path, error.strerror or str(error)) from error


def _seal(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
