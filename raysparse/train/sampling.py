"""Samples of a trial's model, batch by batch: what evaluation measures and what `raysparse sample` writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from raysparse import rng
from raysparse.config import EvaluateConfig, TrialConfig
from raysparse.diffusion import ddim
from raysparse.diffusion.guidance import guided
from raysparse.diffusion.schedule import NoiseSchedule
from raysparse.errors import UsageError
from raysparse.train import runtime
from raysparse.train.conditions import placed


class Source(Protocol):
    """What samples are to be and how they are drawn: a data set's examples, or `ImageSource`."""

    def draw_conditions(
        self, n: int, generator: np.random.Generator
    ) -> tuple[tuple[int, ...], Mapping[str, Tensor]]: ...
    def to_images(self, x: Tensor, cond: Mapping[str, Tensor]) -> Tensor: ...


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """Pictures without their data set: every class as likely as the others."""

    value_shape: tuple[int, ...]  # of x: [C, H, W]
    num_classes: int | None
    decode: Callable[[Tensor], Tensor]  # x float32 [B, C, H, W] -> uint8 [B, 3, H, W]

    def draw_conditions(self, n: int, generator: np.random.Generator) -> tuple[tuple[int, ...], dict[str, Tensor]]:
        shape = (n, *self.value_shape)
        if self.num_classes is None:
            return shape, {}
        return shape, {"labels": torch.from_numpy(generator.integers(0, self.num_classes, n))}

    def to_images(self, x: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return self.decode(x)


class Sampler:
    """Draws from models of one trial. Batch k's noise, conditions and steps are functions of (seed, k) alone."""

    def __init__(
        self, config: TrialConfig, source: Source, noise_schedule: NoiseSchedule, device: torch.device
    ) -> None:
        self.config = config
        self.source = source
        self.noise_schedule = noise_schedule
        self.device = device

    @torch.inference_mode()
    def batch(
        self, model: nn.Module, number: int, count: int, labels: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Batch `number`: x as the model's input, float32 [count, ...], and its conditions.

        labels: instead of drawn ones.
        """
        seed, settings = self.config.seed, self.config.evaluate
        shape, drawn = self.source.draw_conditions(count, rng.numpy_generator(seed, "conditions", step=number))
        cond = placed(drawn, self.device)
        if labels is not None:
            cond["labels"] = torch.tensor(labels, device=self.device)
        noise = torch.randn(shape, generator=rng.generator(seed, "sample noise", step=number)).to(self.device)
        if self.config.train.channels_last and noise.ndim == 4:
            noise = noise.to(memory_format=torch.channels_last)
        draw = rng.generator(seed, "sampling noise", step=number, device=str(self.device))  # for eta > 0
        with runtime.autocast(self.config, self.device):
            x = ddim.sample(
                _denoiser(model, settings),
                self.noise_schedule,
                noise,
                steps=settings.ddim_steps,
                eta=settings.eta,
                cond=cond,
                generator=draw,
                spacing=settings.timestep_spacing,
            )
        return x.float(), cond

    def images(self, model: nn.Module, count: int, labels: Sequence[int] | None = None) -> Iterator[Tensor]:
        """`count` samples as images uint8 [B, C, H, W], batch by batch, under the trial's `evaluate.runtime`.

        labels: one, or one for each sample.
        """
        size = self.config.evaluate.batch_size
        each = None if labels is None else list(labels) * (count if len(labels) == 1 else 1)
        if each is not None and len(each) != count:
            raise UsageError(f"{len(each)} labels for {count} samples; give one label, or one for each sample")
        network = runtime.for_sampling(model, self.config)
        for number, first in enumerate(range(0, count, size)):
            end = min(first + size, count)
            x, cond = self.batch(network, number, end - first, None if each is None else each[first:end])
            yield self.source.to_images(x, cond).cpu()


def _denoiser(model: nn.Module, settings: EvaluateConfig) -> Callable[..., Tensor]:
    """What sampling calls: the model, under classifier-free guidance where the trial asks for it."""
    if settings.guidance is None:
        return model
    null_label: int = model.null_label  # type: ignore[assignment]  # the trial was checked: there is one
    return guided(model, settings.guidance, null_label)
