"""Criteria: what a layer's units are scored by. Pruning takes the lowest scores, growth the highest.

A criterion is a function here, found by its name: Layer -> floating-point scores [units], of any range. A unit is a
weight, or what the pattern prunes as one; scores are sums over it. NaN is chosen last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from raysparse import plugins, rng
from raysparse.sparse import masks
from raysparse.sparse.pattern import Pattern


@dataclass(frozen=True)
class Layer:
    """What a criterion may look at: one layer at one choice of units."""

    name: str
    weight: Tensor  # floating point, any shape
    gradient: Tensor | None  # what METHOD.needs, the weight's shape; None where it needs nothing
    seed: int
    step: int  # optimizer steps so far
    pattern: Pattern
    candidates: Tensor | None = None  # bool [units]: what is chosen from; None: all
    count: int = 0  # how many will be chosen
    settings: Any = field(default=None, repr=False)  # the method's Settings

    def dense_gradient(self) -> Tensor:
        """ValueError where the method's file forgot to ask for it."""
        if self.gradient is None:
            raise ValueError("a criterion looks at the gradient: METHOD must say needs='gradient' or 'momentum'")
        return self.gradient

    def drawn(self, by: torch.device) -> Tensor:
        """Uniform [0, 1) draws, a function of (seed, layer, step), on the weight's device; by: a CPU draws others than
        all other devices, and takes .15 s for the 44 million of U-ViT small/2, five times as long as a step on an H200.
        """
        purpose, units, device = f"sparse/{self.name}", self.pattern.units, self.weight.device
        if by.type != "cpu":
            return rng.uniform(self.seed, purpose, units, step=self.step, device=device)
        draw = rng.generator(self.seed, purpose, step=self.step)
        return torch.rand(units, generator=draw).to(device, non_blocking=True)


def magnitude(layer: Layer) -> Tensor:
    """|weight|."""
    return layer.pattern.total(layer.weight.detach().abs())


def sign_balanced(layer: Layer) -> Tensor:
    """SET (Mocanu et al. 2018): 0 for the smallest positive and the largest negative weights, 1 for the others.

    They are `count`, as many of each sign as it has of the candidates, rounded. Zero counts as positive.
    """
    weight = layer.weight.detach()
    size, positive = layer.pattern.total(weight.abs()), layer.pattern.total(weight) >= 0
    among = torch.ones_like(positive) if layer.candidates is None else layer.candidates
    above, below = positive & among, ~positive & among
    counts = above.sum(), below.sum()  # tensors: a GPU is not asked for them
    share = (layer.count * counts[0]).double() / (counts[0] + counts[1]).clamp(min=1)
    first = torch.minimum(torch.maximum(share.round().long(), layer.count - counts[1]), counts[0])
    chosen = masks.lowest_up_to(size, first, layer.count, above)
    chosen |= masks.lowest_up_to(size, layer.count - first, layer.count, below)
    return (~chosen).float()


def gradient(layer: Layer) -> Tensor:
    """|mean gradient| over ranks and accumulation steps (what .grad holds after the reduction), or |its average|."""
    return layer.pattern.total(layer.dense_gradient().abs())


def random(layer: Layer) -> Tensor:
    """Uniform [0, 1) draws of the weight's device."""
    return layer.drawn(by=layer.weight.device)


def mixed(layer: Layer) -> Tensor:
    """A share `random_share` of the `count` at random, the others where |gradient| is largest."""
    scores = random(layer)
    among = torch.ones_like(scores, dtype=torch.bool) if layer.candidates is None else layer.candidates
    by_gradient = layer.count - round(layer.settings.random_share * layer.count)
    return scores + masks.highest(gradient(layer), by_gradient, among)


Criterion = Callable[[Layer], Tensor]
CRITERIA: dict[str, Criterion] = plugins.functions(__name__)
