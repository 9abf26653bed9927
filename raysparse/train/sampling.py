"""Samples of a trial's model, batch by batch: what evaluation measures and what `raysparse sample` writes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from raysparse import plugins, rng
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


@dataclasses.dataclass(frozen=True)
class Start:
    """What batch `number` is made from, on the host: noise float32 [B, ...] and its conditions."""

    number: int
    noise: Tensor
    cond: dict[str, Tensor]


class Sampler:
    """Draws from models of one trial. Batch k's noise, conditions and steps are functions of (seed, k) alone."""

    def __init__(
        self, config: TrialConfig, source: Source, noise_schedule: NoiseSchedule, device: torch.device
    ) -> None:
        self.config = config
        self.source = source
        self.noise_schedule = noise_schedule
        self.device = device

    def start(self, number: int, count: int, labels: Sequence[int] | None = None) -> Start:
        """labels: instead of drawn ones."""
        seed = self.config.seed
        shape, drawn = self.source.draw_conditions(count, rng.numpy_generator(seed, "conditions", step=number))
        cond = dict(drawn)
        if labels is not None:
            cond["labels"] = torch.tensor(labels)
        return Start(number, torch.randn(shape, generator=rng.generator(seed, "sample noise", step=number)), cond)

    @torch.inference_mode()
    def denoised(self, model: nn.Module, starts: Sequence[Start]) -> list[Tensor]:
        """Of each batch x as the model's input, float32 [B, ...]; of several in one pass what each is alone, to
        rounding. Several at a time are for eta = 0: `at_a_time`."""
        noise = joined([start.noise for start in starts])
        cond = {name: torch.cat([start.cond[name] for start in starts]) for name in starts[0].cond}
        places = None
        if len(starts) > 1 and "lengths" in cond:  # neighbours, which a kernel takes through their points together
            order = cond["lengths"].argsort(descending=True, stable=True)
            noise, cond = noise[order], {name: value[order] for name, value in cond.items()}
            places = order.argsort()
        x = self._denoised(model, noise, placed(cond, self.device), starts[0].number)
        if places is not None:
            x = x[places.to(self.device)]
        parts = zip(torch.split(x, [len(start.noise) for start in starts]), starts, strict=True)
        return [part[:, : start.noise.shape[1]] for part, start in parts]  # without what `joined` added

    def batch(self, model: nn.Module, number: int, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Batch `number`: x as above, float32 [count, ...], and its conditions."""
        start = self.start(number, count)
        return self.denoised(model, [start])[0], start.cond

    def at_a_time(self) -> int:
        """Batches that one pass is best given."""
        if self.device.type != "cuda":
            return 1
        return batches_for_a_gpu(self.config, self.start(0, self.config.evaluate.batch_size).noise.shape)

    def images(self, model: nn.Module, count: int, labels: Sequence[int] | None = None) -> Iterator[Tensor]:
        """`count` samples as images uint8 [B, C, H, W], batch by batch, under the trial's `evaluate.runtime`.

        labels: one, or one for each sample.
        """
        size = self.config.evaluate.batch_size
        each = None if labels is None else list(labels) * (count if len(labels) == 1 else 1)
        if each is not None and len(each) != count:
            raise UsageError(f"{len(each)} labels for {count} samples; give one label, or one for each sample")
        network = runtime.for_sampling(model, self.config)
        batches, at_a_time = range(math.ceil(count / size)), self.at_a_time()
        for first in batches[::at_a_time]:
            starts = [
                self.start(number, min(size, count - number * size), each and each[number * size :][:size])
                for number in batches[first:][:at_a_time]
            ]
            for start, x in zip(starts, self.denoised(network, starts), strict=True):
                yield self.source.to_images(x, start.cond).cpu()

    def _denoised(self, model: nn.Module, noise: Tensor, cond: Mapping[str, Tensor], number: int) -> Tensor:
        settings = self.config.evaluate
        noise = noise.to(self.device)
        if self.config.train.channels_last and noise.ndim == 4:
            noise = noise.to(memory_format=torch.channels_last)
        draw = rng.generator(self.config.seed, "sampling noise", step=number, device=str(self.device))  # for eta > 0
        with runtime.autocast(self.config.sampling_precision, self.device):
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
        return x.float()


def batches_for_a_gpu(config: TrialConfig, shape: Sequence[int]) -> int:
    """Batches that one pass is best given there: as many as the model says that it takes to fill a GPU. shape: of one
    batch's noise."""
    settings, model = config.evaluate, config.model
    module = plugins.load("models", model.name)
    if settings.eta > 0 or not hasattr(module, "sampled_together"):
        return 1  # with eta > 0 each batch draws noise of its own at each step
    together: int = module.sampled_together(module.Config(**model.options), shape)
    return max(1, together // settings.batch_size)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """One after the other, zero beyond the end of those whose second dimension is shorter: sketches [B, L, 3]."""
    longest = max(part.shape[1] for part in parts)
    empty = [part.new_zeros(len(part), longest - part.shape[1], *part.shape[2:]) for part in parts]
    return torch.cat([torch.cat(pair, 1) for pair in zip(parts, empty, strict=True)])


def _denoiser(model: nn.Module, settings: EvaluateConfig) -> Callable[..., Tensor]:
    """What sampling calls: the model, under classifier-free guidance where the trial asks for it."""
    if settings.guidance is None:
        return model
    null_label: int = model.null_label  # type: ignore[assignment]  # the trial was checked: there is one
    return guided(model, settings.guidance, null_label)
