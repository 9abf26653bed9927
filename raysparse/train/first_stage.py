"""The first stage at work: pictures to latents when a data set is prepared, latents to pictures when one is evaluated.

Frozen and dense, so a plain function of its input. Small to send to another process: weights are read where they are
first used, once per process and device.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from raysparse import plugins
from raysparse.config import FirstStageConfig
from raysparse.data.image import to_pixels
from raysparse.errors import UsageError, usage_error_from

FP16_MAX = 65504.0  # the largest number that latents can be kept as


@dataclasses.dataclass(frozen=True)
class FirstStage:
    """Encodes pictures (it is the Encoder that `prepared.prepare` takes) and decodes latents.

    identity: sha256 of architecture and weights. device: where it computes. batch_size: pictures at a time.
    """

    identity: str
    config: FirstStageConfig = dataclasses.field(hash=False)
    device: str = "cpu"
    batch_size: int = 8

    @classmethod
    def of(cls, config: FirstStageConfig, device: str | torch.device = "cpu", batch_size: int = 8) -> FirstStage:
        """A first stage from a trial's settings; reads the weights.

        UsageError: unknown name or option, weights that cannot be had or are others than config.sha256 says.
        """
        if config.weights is not None and (path := Path(config.weights).expanduser()).exists():  # else a Hub id
            config = config.model_copy(update={"weights": str(path.resolve())})  # workers start elsewhere
        identity = _loaded(config)[1]
        if config.sha256 is not None and identity != config.sha256:
            raise UsageError(
                f"first_stage.sha256 is {config.sha256}, but first_stage.weights {config.weights} have the identity "
                f"{identity}; give the weights that are meant, or change first_stage.sha256"
            )
        return cls(identity, config, str(device), batch_size)

    def latent_shape(self, size_px: int) -> tuple[int, int, int]:
        """(c, h, w) of the latent of a square picture. UsageError: a size that cannot be halved so often."""
        options = _options(self.config)
        if size_px < 1 or size_px % options.factor:
            raise UsageError(
                f"size_px is {size_px}, but the first stage makes pictures {options.factor} times smaller; take a "
                f"multiple of {options.factor}"
            )
        return options.channels, size_px // options.factor, size_px // options.factor

    def __call__(self, pictures: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> latents float16 [B, c, h, w] on the CPU, not quantised.

        UsageError: not such pictures, or latents that are not finite or that 16 bits cannot hold.
        """
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
            raise UsageError(f"an encoder takes uint8 [B, 3, H, W], got {pictures.dtype} {list(pictures.shape)}")
        with self._model() as model:
            parts = [model.encode(part.to(self.device).float() / 127.5 - 1).cpu() for part in self._parts(pictures)]
        latents = torch.cat(parts)
        if not bool((latents.abs() <= FP16_MAX).all()):  # NaN is not below it either
            raise UsageError(
                f"the first stage made latents up to {float(latents.abs().max()):g}, which 16 bits cannot hold; do "
                f"first_stage.weights ({self.config.weights}) belong to first_stage.options?"
            )
        return latents.half()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, c, h, w] -> pictures uint8 [B, 3, H, W] on `device`. What is not finite counts as 0."""
        with self._model() as model:
            parts = [model.decode(_finite(part.to(self.device).float())) for part in self._parts(latents)]
        return to_pixels(torch.cat(parts))

    def _parts(self, batch: Tensor) -> tuple[Tensor, ...]:
        return torch.split(batch, self.batch_size)

    @contextmanager
    def _model(self) -> Iterator[Any]:
        """The network, ready for float32 without gradients whatever the caller's context is."""
        model, identity = _on_device(self.config, self.device)
        if identity != self.identity:
            raise UsageError(
                f"first_stage.weights {self.config.weights} have the identity {identity} here, but {self.identity} was "
                "asked for; have they been replaced, or is it another file on this machine?"
            )
        with torch.no_grad(), torch.autocast(torch.device(self.device).type, enabled=False):
            yield model


def _finite(values: Tensor) -> Tensor:
    return values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _module(config: FirstStageConfig) -> ModuleType:
    module = plugins.load("models", config.name)
    if module.KIND != "first_stage":
        known = [name for name in plugins.names("models") if plugins.load("models", name).KIND == "first_stage"]
        raise UsageError(f"first_stage.name {config.name!r} is a {module.KIND}; first stages: {', '.join(known)}")
    return module


def _options(config: FirstStageConfig) -> Any:
    """The Config of its file, checked. UsageError naming the key, with the nearest valid one."""
    options: Any = _module(config).Config
    try:
        return options.model_validate(dict(config.options))
    except ValidationError as error:
        raise usage_error_from(error, "first_stage.options", options) from None


def _loaded(config: FirstStageConfig) -> tuple[Any, str]:
    """The network on the CPU and its identity."""
    return _read(config.name, config.weights, _key(config), _stamp(config.weights))


def _on_device(config: FirstStageConfig, device: str) -> tuple[Any, str]:
    if torch.device(device).type == "cpu":
        return _loaded(config)
    return _moved(config.name, config.weights, _key(config), _stamp(config.weights), device)


def _key(config: FirstStageConfig) -> str:
    return json.dumps(_options(config).model_dump(mode="json"), sort_keys=True)


def _stamp(weights: str | None) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the files that weights are read from: files replaced under a name are read again."""
    path = Path(weights).expanduser() if weights is not None else None
    if path is None or not path.exists():
        return ()
    files = [path] if path.is_file() else sorted(f for depth in ("*", "*/*") for f in path.glob(depth) if f.is_file())
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)


@functools.lru_cache(maxsize=2)
def _read(name: str, weights: str | None, options: str, stamp: tuple[Any, ...]) -> tuple[Any, str]:
    module = plugins.load("models", name)
    settings = module.Config.model_validate_json(options)
    with torch.device("cpu"):
        model = module.build(settings, seed=0) if weights is None else module.load(weights, settings)
    return model, module.identity(model)


@functools.lru_cache(maxsize=2)
def _moved(name: str, weights: str | None, options: str, stamp: tuple[Any, ...], device: str) -> tuple[Any, str]:
    model, identity = _read(name, weights, options, stamp)
    return copy.deepcopy(model).to(device), identity
