"""What one evaluation of a trial measures, with the averaged masked weights: validation loss, FID, KID, a picture.

Sampling and extraction are shared over the ranks by batch; the noise, the conditions and the timesteps of a batch are
functions of the batch's number alone, so the values do not depend on how many ranks there are, and a trial's FIDs at
two steps (and the pictures of two trials with one seed) start from the same noise.
"""

from __future__ import annotations

import dataclasses
import io
import math
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from raysparse import rng
from raysparse.config import TrialConfig
from raysparse.diffusion import losses
from raysparse.diffusion.schedule import NoiseSchedule
from raysparse.metrics import fidelity
from raysparse.metrics.extractors._base import exactly
from raysparse.metrics.reference import Reference
from raysparse.train import distributed, runtime
from raysparse.train.conditions import placed
from raysparse.train.sampling import Sampler, joined

# The trial's own protocol, the cheaper one of the evaluations before the last step, or both.
Which = Literal["own", "intermediate", "both"]

VALIDATION_GROUP = 64  # whose noise is drawn together: a constant, so that it depends on no setting
VALIDATION_SEED = 0  # the same noise and timesteps for every trial, so that validation losses compare across seeds


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Where this rank's time went."""

    validation: float = 0.0
    sampling: float = 0.0
    extraction: float = 0.0  # drawing included
    fid: float = 0.0
    kid: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """validation_loss and FIDs: finite unless `wrong` says which is not; None where that protocol was not asked for."""

    validation_loss: float
    fid: float | None = None  # under the trial's own protocol
    kid: float | None = None  # likewise
    kid_std: float | None = None
    intermediate_fid: float | None = None
    samples_png: bytes | None = None  # of the dearer protocol that was asked for
    wrong: str | None = None  # what is not finite, in words
    seconds: Seconds = Seconds()


@dataclasses.dataclass(frozen=True)
class _Measured:
    """Of one protocol; NaN where another rank or nobody knows."""

    fid: float = math.nan
    kid: float | None = math.nan
    kid_std: float | None = math.nan
    samples_png: bytes | None = None
    wrong: str | None = None
    seconds: Seconds = Seconds()


class Evaluator:
    """Evaluates models of one trial. `evaluate` is called by all ranks together and changes nothing in the model.

    reference: features and statistics of the reference examples; extractor: the one that made them. image_shape:
    [C, H, W] of those examples' images, which a sample's image must have too.
    """

    clock = staticmethod(time.perf_counter)  # in seconds; benchmarks/fid.py may count those of the CPU

    def __init__(
        self,
        config: TrialConfig,
        *,
        training: Any,
        validation: Any,
        extractor: Any,
        reference: Reference,
        image_shape: tuple[int, ...],
        noise_schedule: NoiseSchedule,
        protocol: fidelity.Protocol,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        runtime.check(config, device)  # now, not after the first steps
        self.config = config
        # Samples take their lengths and labels from the training examples.
        self.sampler = Sampler(config, training, noise_schedule, device)
        cheaper = config.intermediate
        self.intermediate = Sampler(cheaper, training, noise_schedule, device) if cheaper else None
        self.validation = validation
        self.extractor = extractor
        self.reference = reference
        self.image_shape = image_shape
        self.noise_schedule = noise_schedule
        self.protocol = protocol
        self.device = device
        self.rank = rank
        self.world_size = world_size

    @torch.inference_mode()
    def evaluate(
        self, model: nn.Module, should_stop: Callable[[], bool] = lambda: False, which: Which = "own"
    ) -> Evaluation | None:
        """Measure `model` (in eval mode, on `device`). The values are rank 0's to use; other ranks only help.

        should_stop: asked before each pass over samples; any rank's yes ends it on all, with None. which: the protocols
        of the FIDs; a trial without an intermediate one has its own alone.
        """
        network = runtime.for_sampling(model, self.config)
        start = self.clock()
        found = Evaluation(self.validation_loss(network), seconds=Seconds(validation=self.clock() - start))
        if not math.isfinite(found.validation_loss):
            return dataclasses.replace(found, wrong=f"validation loss became {found.validation_loss}")
        if self.intermediate is not None and which != "own":
            early = self._measured(network, self.intermediate, should_stop)
            if early is None:
                return None
            found = dataclasses.replace(
                found,
                intermediate_fid=early.fid,
                samples_png=early.samples_png,
                wrong=early.wrong,
                seconds=found.seconds + early.seconds,
            )
            if which == "intermediate":
                return found
        own = self._measured(network, self.sampler, should_stop, kid=True)
        if own is None:
            return None
        return dataclasses.replace(
            found,
            fid=own.fid,
            kid=own.kid,
            kid_std=own.kid_std,
            samples_png=own.samples_png,
            wrong=found.wrong or own.wrong,
            seconds=found.seconds + own.seconds,
        )

    @torch.inference_mode()
    def validation_loss(self, network: nn.Module) -> float:
        """eps loss over (the first) validation examples under fixed noise and timesteps; the same on all ranks."""
        count = min(len(self.validation), self.config.evaluate.validation_examples)
        size = VALIDATION_GROUP
        starts = range(0, count, size)[self.rank :: self.world_size]
        at_a_time = max(1, self.config.evaluate.batch_size // size)  # groups: as many examples as are sampled at a time
        total = torch.zeros(2, dtype=torch.float64)  # of losses, of examples
        for first in range(0, len(starts), at_a_time):
            groups = [self._noised(start, min(start + size, count)) for start in starts[first : first + at_a_time]]
            xs, noises, times, conds = zip(*groups, strict=True)
            x, eps, t = (part.to(self.device) for part in (joined(xs), joined(noises), torch.cat(times)))
            cond = placed({name: torch.cat([cond[name] for cond in conds]) for name in conds[0]}, self.device)
            with runtime.autocast(self.config.sampling_precision, self.device):
                prediction = network(self.noise_schedule.add_noise(x, eps, t), t, **cond)
                loss = losses.eps_mse(prediction, eps, cond.get("lengths"))
            total += torch.tensor([float(loss) * len(x), len(x)], dtype=torch.float64)
        total = distributed.all_sum(total.to(self.device), self.world_size)
        return float(total[0] / total[1])

    def _noised(self, start: int, end: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """A group of validation examples, their noise, timesteps int64 [B] and conditions, on the host."""
        batch = self.validation.batch(np.arange(start, end))
        draw = rng.generator(VALIDATION_SEED, "validation noise", step=start // VALIDATION_GROUP)
        t = torch.randint(0, self.config.diffusion.timesteps, (end - start,), generator=draw)
        return batch["x"], torch.randn(batch["x"].shape, generator=draw), t, batch["cond"]

    def _measured(
        self, network: nn.Module, sampler: Sampler, should_stop: Callable[[], bool], *, kid: bool = False
    ) -> _Measured | None:
        """FID (and KID) of the samples of one protocol; None: asked to stop."""
        sampled = self.sample_features(network, sampler, should_stop)
        if sampled is None:
            return None
        features, images, sampling_s, extraction_s = sampled
        if self.rank != 0 or not bool(torch.isfinite(features).all()):
            return _Measured(wrong=None if self.rank else "the samples' features are not finite")
        values = features.numpy()
        start = self.clock()
        fid = fidelity.fid(fidelity.statistics(values), self.reference.statistics)
        middle = self.clock()
        kid_value, kid_std = self._kid(values) if kid else (None, None)
        seconds = Seconds(0.0, sampling_s, extraction_s, middle - start, self.clock() - middle)
        picture = grid_png(images) if len(images) else None
        wrong = None if math.isfinite(fid) else f"FID became {fid}"
        return _Measured(fid, kid_value, kid_std, picture, wrong, seconds)

    @torch.inference_mode()
    def sample_features(
        self, network: nn.Module, sampler: Sampler, should_stop: Callable[[], bool] = lambda: False
    ) -> tuple[Tensor, Tensor, float, float] | None:
        """Features of all samples float32 [generated, D], the first drawn uint8 [grid, C, H, W], seconds."""
        settings = sampler.config.evaluate
        features = torch.zeros(settings.generated, self.extractor.feature_dim, device=self.device)
        images = torch.zeros((min(settings.grid, settings.generated), *self.image_shape), dtype=torch.uint8)
        sampling_s = extraction_s = 0.0
        size, batches = settings.batch_size, math.ceil(settings.generated / settings.batch_size)
        for numbers in passes(batches, sampler.at_a_time(), self.rank, self.world_size):
            asked = torch.tensor(float(should_stop()), device=self.device)
            if distributed.all_sum(asked, self.world_size) > 0:
                return None
            if not numbers:
                continue
            start = self.clock()
            starts = [sampler.start(number, min(size, settings.generated - number * size)) for number in numbers]
            sampled = sampler.denoised(network, starts)
            self._wait()  # else the seconds of sampling would be counted as extraction's
            middle = self.clock()
            for number, x, begun in zip(numbers, sampled, starts, strict=True):
                drawn, first = sampler.source.to_images(x, begun.cond), number * size
                features[first : first + len(drawn)] = exactly(self.extractor, drawn.to(self.device))
                images[first : first + len(drawn)] = drawn[: max(0, len(images) - first)].cpu()
            self._wait()
            sampling_s += middle - start
            extraction_s += self.clock() - middle
        images = distributed.all_sum(images.to(self.device), self.world_size)
        return distributed.all_sum(features, self.world_size).cpu(), images.cpu(), sampling_s, extraction_s

    def _wait(self) -> None:
        """For what the device has been asked to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _kid(self, features: np.ndarray[Any, Any]) -> tuple[float, float]:
        assert self.protocol.kid_subsets is not None
        assert self.protocol.kid_subset_size is not None
        return fidelity.kid(
            features,
            self.reference.features,
            subsets=self.protocol.kid_subsets,
            subset_size=self.protocol.kid_subset_size,
            seed=self.config.seed,
            device=self.device,
        )


def passes(batches: int, at_a_time: int, rank: int, world_size: int) -> list[range]:
    """The batches of each of a rank's passes, as many passes on every rank, the last of them perhaps of no batch."""
    count = math.ceil(batches / (world_size * at_a_time))
    each = math.ceil(batches / (world_size * count))
    return [
        range(batches)[first : first + each]
        for first in range(rank * each, count * world_size * each, world_size * each)
    ]


def grid_png(images: Tensor) -> bytes:
    """A square-ish grid of images uint8 [N, 1 or 3, H, W], row by row, white where there is none, as PNG."""
    count, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = np.full((rows * height, columns * width, channels), 255, np.uint8)
    for place, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        top, left = place // columns * height, place % columns * width
        sheet[top : top + height, left : left + width] = image
    buffer = io.BytesIO()
    Image.fromarray(sheet[..., 0] if channels == 1 else sheet).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
