"""A dense, trained network that a method starts from or learns from (SparseDM's knowledge transfer).

It is a checkpoint of raysparse (its averaged weights), or a folder of diffusers: a pipeline's, with `unet/` and
`scheduler/`, or one that holds config.json, the weights and scheduler_config.json itself. It has the trial's own
architecture and noise schedule.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raysparse import config as configs
from raysparse import plugins
from raysparse.config import TrialConfig
from raysparse.diffusion import losses
from raysparse.errors import UsageError
from raysparse.train import checks, diffusers_parts, restored, state

SCHEDULER = "scheduler_config.json"
# diffusers' name of each of our settings of noise
NOISE = {
    "num_train_timesteps": "timesteps",
    "beta_schedule": "beta_schedule",
    "beta_start": "beta_start",
    "beta_end": "beta_end",
}


class Teacher:
    """The frozen network and its part in the loss."""

    def __init__(self, model: nn.Module, config: TrialConfig, device: torch.device) -> None:
        self._model = model.to(device).eval().requires_grad_(False)
        self._loss = config.sparse.setting("loss")
        self._weight = float(config.sparse.setting("teacher_weight"))
        self._bf16 = bool(config.sparse.setting("teacher_bf16"))
        self._device = device

    def loss(self, prediction: Tensor, eps: Tensor, x: Tensor, timesteps: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """||eps_t - eps_s||^2, or with the noise: ||eps - eps_s||^2 + weight x that; float32 scalar, as eps_mse."""
        lengths = cond.get("lengths")
        with torch.no_grad(), self._precision():
            theirs = self._model(x, timesteps, **cond).float()
        taught = losses.eps_mse(prediction, theirs, lengths)
        if self._loss == "teacher":
            return taught
        return losses.eps_mse(prediction, eps, lengths) + self._weight * taught

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16)


def load(config: TrialConfig) -> nn.Module | None:
    """The trial's teacher, on the CPU; None where its method has none.

    UsageError: nothing there that is one, another architecture or noise schedule, a sparse network, a path left out.
    """
    place = config.sparse.setting("teacher")
    if place is None:
        return None
    if place == configs.LEFT_OUT:
        raise UsageError(
            "these are an exported model's settings, which do not say where its teacher lies; to train with them set "
            "sparse.teacher to a dense checkpoint of raysparse or a diffusers folder"
        )
    folder = Path(place)
    if not folder.is_dir():
        raise UsageError(f"teacher {folder} is no folder; give a dense checkpoint of raysparse or a diffusers folder")
    if (folder / "unet").is_dir() or (folder / "config.json").is_file():
        return _of_diffusers(config, folder)
    return _of_raysparse(config, folder)


def of(config: TrialConfig, model: nn.Module | None, device: torch.device) -> Teacher | None:
    """What takes part in the loss; None where the loss is of the noise alone."""
    return None if model is None or config.sparse.setting("loss") == "noise" else Teacher(model, config, device)


def _of_raysparse(config: TrialConfig, folder: Path) -> nn.Module:
    place = restored.latest(folder)
    theirs = configs.parse(state.manifest(place)["config"], f"teacher {place}")
    if (theirs.model.name, checks.model_options(theirs)) != (config.model.name, checks.model_options(config)):
        raise UsageError(
            f"teacher {place} is a {theirs.model.name} with options {theirs.model.options}, the trial's model is "
            f"{config.model.name} with {config.model.options}; a teacher has the same architecture"
        )
    if theirs.diffusion != config.diffusion:
        raise UsageError(
            f"teacher {place} was trained with the noise schedule {theirs.diffusion}, the trial has {config.diffusion}"
        )
    if theirs.sparse.method != "dense":
        raise UsageError(f"teacher {place} was trained by {theirs.sparse.method}; a teacher is dense")
    return restored.load(place).model


def _of_diffusers(config: TrialConfig, folder: Path) -> nn.Module:
    _check_noise(config, folder)
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    model: nn.Module = plugins.load("models", config.model.name).build(checks.model_options(config), seed=config.seed)
    if not diffusers_parts.is_diffusers(model) or set(dict(model.named_children())) != {"unet"}:
        raise UsageError(
            f"teacher {folder} is a diffusers folder, but model {config.model.name!r} is not a network of diffusers "
            "alone; give a dense checkpoint of raysparse"
        )
    _check_architecture(model.unet, unet)
    try:
        loaded = type(model.unet).from_pretrained(unet, local_files_only=True, low_cpu_mem_usage=False)  # type: ignore[union-attr]
        model.unet.load_state_dict(loaded.state_dict())  # type: ignore[union-attr]
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"teacher {unet} does not load as the trial's {config.model.name}: {reason}") from error
    return model


def _check_noise(config: TrialConfig, folder: Path) -> None:
    found = [path for path in (folder / "scheduler" / SCHEDULER, folder / SCHEDULER) if path.is_file()]
    if not found:
        raise UsageError(
            f"teacher {folder} has no {SCHEDULER}, so its noise schedule is unknown; give the whole pipeline"
        )
    theirs = _json(found[0])
    for name, ours in NOISE.items():
        if theirs.get(name) != getattr(config.diffusion, ours):
            raise UsageError(
                f"teacher {folder} has {name} {theirs.get(name)!r}, the trial diffusion.{ours} "
                f"{getattr(config.diffusion, ours)!r}; a teacher has the same noise schedule"
            )
    if theirs.get("prediction_type", "epsilon") != "epsilon":
        raise UsageError(f"teacher {folder} predicts {theirs['prediction_type']!r}, not the noise (epsilon)")


def _check_architecture(ours: Any, folder: Path) -> None:
    """What two networks can differ in without another shape of a weight: heads, groups, paddings."""
    theirs = _json(folder / "config.json")
    if theirs.get("_class_name") != type(ours).__name__:
        raise UsageError(f"teacher {folder} is a {theirs.get('_class_name')}, the trial's a {type(ours).__name__}")
    for name, value in ours.config.items():
        if name.startswith("_") or name not in theirs:
            continue
        mine = list(value) if isinstance(value, tuple) else value
        if theirs[name] != mine:
            raise UsageError(
                f"teacher {folder} has {name} {theirs[name]!r}, the trial's network {mine!r}; a teacher has the same "
                "architecture"
            )


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} is no mapping; is it the folder of a diffusers model?")
    return content
