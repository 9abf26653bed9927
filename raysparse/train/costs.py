"""Parameters and FLOPs of a trial from its settings alone: its model is built on the meta device, nothing runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from pydantic import BaseModel
from torch import nn

from raysparse import plugins
from raysparse.config import SparseConfig, TrialConfig
from raysparse.diffusion import ddim
from raysparse.metrics import flops, params
from raysparse.sparse import allocation, criteria, masks


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
    dense_gradient_interval: int | None  # ΔTe where growth takes the dense gradient
    update_end_step: int  # no topology update after this step

    def inference(self, convention: flops.Convention, *, dense: bool = False) -> float:
        """One sample, all evaluations of the network: DDIM steps as they are done, twice with guidance."""
        densities = None if dense else self.densities
        return flops.inference(self.macs, densities, ddim_steps=evaluations(self.config), convention=convention)

    def train(self, convention: flops.Convention, steps: int, *, dense: bool = False) -> float:
        """The first `steps` optimizer steps, with the dense gradients that topology updates take."""
        batch_size, growing = self.config.train.batch_size, min(steps, self.update_end_step)
        densities = None if dense else self.densities

        def cost(count: int, interval: int | None) -> float:
            return flops.train(
                self.macs,
                densities,
                steps=count,
                batch_size=batch_size,
                convention=convention,
                dense_gradient_interval=interval,
            )

        return cost(growing, None if dense else self.dense_gradient_interval) + cost(steps - growing, None)

    def spent(self, steps: int) -> tuple[float, float]:
        """Training FLOPs of the first `steps` steps: (paper, true)."""
        return self.train(self.paper, steps), self.train(flops.TRUE, steps)


def costs(config: TrialConfig, options: BaseModel, mean_points: float) -> Costs:
    """The costs of a trial. options: the model's, checked; mean_points: of a training sketch (images: no matter)."""
    module = plugins.load("models", config.model.name)
    points = max(1, math.ceil(mean_points))
    with torch.device("meta"):
        model = module.build(options, seed=config.seed)
    inputs = module.example(options, 1, points, device="meta")
    macs = flops.forward_macs(model, inputs, batch=1)
    if inputs["x"].ndim == 3:  # a sketch; of an image all is counted that there is
        macs = {name: count * mean_points / points for name, count in macs.items()}
    densities = _densities(config.sparse, model)
    method = plugins.load("methods", config.sparse.method).METHOD
    return Costs(
        config=config,
        macs=macs,
        densities=densities,
        mean_points=mean_points,
        params_total=params.count(model),
        params_active=params.active_at(model, densities),
        paper=flops.paper_convention(module),
        dense_gradient_interval=config.sparse.update_interval if method.grow in criteria.NEEDS_GRADIENT else None,
        update_end_step=update_end_step(config),
    )


def evaluations(config: TrialConfig) -> int:
    """How often the network runs for one sample: its DDIM steps, twice each with classifier-free guidance."""
    settings = config.evaluate
    times = ddim.timesteps(config.diffusion.timesteps, settings.ddim_steps, spacing=settings.timestep_spacing)
    return len(times) * (1 if settings.guidance is None else 2)


def update_end_step(config: TrialConfig) -> int:
    """No topology update at this optimizer step or after it."""
    return max(1, round((config.sparse.update_end_fraction or 1.0) * config.train.steps))


def _densities(sparse: SparseConfig, model: nn.Module) -> dict[str, float]:
    """Of the layers that the method masks; none where it is dense."""
    if sparse.sparsity is None or sparse.allocation is None:
        return {}
    shapes = masks.shapes(model, masks.maskable(model))
    groups = getattr(model, "allocation_groups", ())
    return allocation.densities(shapes, sparsity=sparse.sparsity, allocation=sparse.allocation, groups=groups)
