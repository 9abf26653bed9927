"""Parameters and FLOPs of a trial from its settings alone: its model is built and sees one example, no data."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from pydantic import BaseModel
from torch import nn

from raysparse import plugins
from raysparse.config import TrialConfig
from raysparse.diffusion import ddim
from raysparse.metrics import flops, params
from raysparse.sparse import masks
from raysparse.sparse.dense_weights import stages
from raysparse.sparse.gradients import window
from raysparse.sparse.layout import Layout, layout
from raysparse.sparse.ranges import layouts
from raysparse.sparse.schedules import UpdateSchedule


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a trial costs. macs, densities: by parameter name; a name without a density is dense."""

    config: TrialConfig
    macs: Mapping[str, float]  # of one sample's forward pass; sketches: at the mean number of points
    densities: Mapping[str, float]
    mean_points: float  # of a training sketch; 1 for images
    params_total: int
    params_active: int
    paper: flops.Convention
    schedule: UpdateSchedule | None  # where growth takes the dense gradient
    dense_gradients: int  # steps with a dense gradient per update
    update_end_step: int  # no topology update after this step
    stages: Sequence[Mapping[str, float]] = ()  # densities of a method whose weights stay dense under its masks
    ranges: Sequence[Mapping[str, float]] = ()  # densities of each range of timesteps
    by_element: Sequence[str] = ()  # layers that another pattern leaves to single weights
    stays_dense: Mapping[str, str] = dataclasses.field(
        default_factory=dict
    )  # layers that the pattern leaves dense: why

    def inference(self, convention: flops.Convention, *, dense: bool = False) -> float:
        """One sample, all evaluations of the network: DDIM steps as they are done, twice with guidance."""
        densities = None if dense else self._over(timesteps(self.config))
        return flops.inference(self.macs, densities, ddim_steps=evaluations(self.config), convention=convention)

    def _over(self, times: Sequence[int]) -> Mapping[str, float]:
        """The mean densities over timesteps: cost is linear in them. One for all where there are no ranges."""
        if not self.ranges:
            return self.densities
        bounds = self.config.sparse.settings().bounds()
        share = [0] * len(bounds)
        for time in times:
            share[bisect.bisect_right(bounds, time)] += 1
        return {
            name: sum(count * own[name] for count, own in zip(share, self.ranges, strict=True)) / len(times)
            for name in self.densities
        }

    def train(
        self, convention: flops.Convention, steps: int, *, dense: bool = False, updates: int | None = None
    ) -> float:
        """The first `steps` optimizer steps, with the dense gradients that topology updates take.

        updates: how many there were; None: as planned, if the FID never stalls. The papers' conventions go by a ΔTe
        that is constant.
        """
        batch_size, growing = self.config.train.batch_size, min(steps, self.update_end_step)
        densities = self._over(range(self.config.diffusion.timesteps))

        def cost(count: int, of: Mapping[str, float] | None, interval: float | None, gradients: int) -> float:
            return flops.train(
                self.macs,
                of,
                steps=count,
                batch_size=batch_size,
                convention=convention,
                dense_gradient_interval=interval,
                dense_gradients=gradients,
            )

        if dense:
            return cost(steps, None, None, 0)
        if self.stages:
            taught = self.config.sparse.setting("loss") != "noise"
            teaching = cost(steps, None, None, 0) / 3 if taught else 0.0  # the teacher's forward pass
            return teaching + sum(cost(count, of, 1, 2) for count, of in self._staged(steps))
        interval = self._interval(growing, updates, convention)
        return cost(growing, densities, interval, self.dense_gradients) + cost(steps - growing, densities, None, 0)

    def spent(self, steps: int, updates: int | None = None) -> tuple[float, float]:
        """Training FLOPs of the first `steps` steps: (paper, true)."""
        return self.train(self.paper, steps, updates=updates), self.train(flops.TRUE, steps, updates=updates)

    def _staged(self, steps: int) -> Iterator[tuple[int, Mapping[str, float]]]:
        """How many of the first `steps` steps each stage has, and its densities.

        Every weight gradient is dense there, as if each interval of RigL's were such steps alone: (2 r + 1) / 3.
        """
        length = int(self.config.sparse.setting("stage_steps"))
        for index, densities in enumerate(self.stages):
            last = index + 1 == len(self.stages)
            count = steps - index * length if last else min(steps - index * length, length)
            if count > 0:
                yield count, densities

    def _interval(self, steps: int, updates: int | None, convention: flops.Convention) -> float | None:
        """ΔTe where growth takes the dense gradient: the mean over `steps`; None where it does not."""
        if self.schedule is None:
            return None
        if convention.update_apart and self.schedule.interval_schedule == "constant":
            return self.schedule.interval
        count = self.schedule.updates(steps) if updates is None else updates
        return max(1.0, steps / count) if count else None


def costs(config: TrialConfig, options: BaseModel, mean_points: float) -> Costs:
    """The costs of a trial. options: the model's, checked; mean_points: of a training sketch (images: no matter)."""
    module = plugins.load("models", config.model.name)
    points = max(1, math.ceil(mean_points))
    sketch = module.example(options, 1, points)["x"].ndim == 3
    # A model of sketches is small and really runs, 10 ms: the first operation on the meta device imports PyTorch's
    # compiler, which is 1.5 of the 8.7 CPU s that the driver of a small sweep takes.
    device = "cpu" if sketch else "meta"
    with torch.device(device):
        model = module.build(options, seed=config.seed)
    macs = flops.forward_macs(model, module.example(options, 1, points, device=device), batch=1)
    if sketch:  # of an image all is counted that there is
        macs = {name: count * mean_points / points for name, count in macs.items()}
    staged, ranged, found = laid_out(model, config)
    settings, method = config.sparse.settings(), plugins.load("methods", config.sparse.method).METHOD
    densities = found.densities() if found else {}
    grows_by_gradient = method.needs is not None
    return Costs(
        config=config,
        macs=macs,
        densities=densities,
        mean_points=mean_points,
        params_total=params.count(model),
        params_active=params.active_at(model, densities),
        paper=flops.paper_convention(module),
        schedule=UpdateSchedule.of(settings, update_end_step(config)) if grows_by_gradient else None,
        dense_gradients=window(method.needs, getattr(settings, "gradient_momentum", 0.0)),
        update_end_step=update_end_step(config),
        stages=[stage.densities() for stage in staged],
        ranges=[one.densities() for one in ranged],
        by_element=found.by_element if found else (),
        stays_dense=found.dense if found else {},
    )


def laid_out(model: nn.Module, config: TrialConfig) -> tuple[list[Layout], list[Layout], Layout | None]:
    """The layouts of a method's stages, of its ranges of timesteps, and of all that is trained (None: dense).

    UsageError as `layout`.
    """
    settings, method = config.sparse.settings(), plugins.load("methods", config.sparse.method).METHOD
    weights = masks.maskable(model)
    if method.straight_through:
        staged = stages(model, weights, settings)
        return staged, [], staged[-1]
    if method.by_timestep:
        ranged, found = layouts(model, weights, settings)
        return [], ranged, found
    return [], [], layout(model, weights, settings) if method.sparse else None


def evaluations(config: TrialConfig) -> int:
    """How often the network runs for one sample: its DDIM steps, twice each with classifier-free guidance."""
    return len(timesteps(config)) * (1 if config.evaluate.guidance is None else 2)


def timesteps(config: TrialConfig) -> Sequence[int]:
    """The timesteps that a sample goes through."""
    settings = config.evaluate
    return ddim.timesteps(config.diffusion.timesteps, settings.ddim_steps, spacing=settings.timestep_spacing)


def update_end_step(config: TrialConfig) -> int:
    """No topology update at this optimizer step or after it."""
    return max(1, round((config.sparse.update_end_fraction or 1.0) * config.train.steps))
