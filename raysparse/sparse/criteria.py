"""Criteria: what a layer's connections are scored by. Pruning takes the lowest scores, growth the highest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from raysparse import rng


@dataclass(frozen=True)
class Layer:
    """What a criterion may look at: one layer at one topology update."""

    name: str
    weight: Tensor  # floating point, any shape
    gradient: Tensor | None  # dense gradient, the weight's shape; None where the method does not ask for it
    seed: int
    step: int  # optimizer steps so far


def magnitude(layer: Layer) -> Tensor:
    """|weight|, float, the weight's shape."""
    return layer.weight.detach().abs()


def gradient(layer: Layer) -> Tensor:
    """|mean gradient| over ranks and accumulation steps: what .grad holds after the reduction."""
    assert layer.gradient is not None
    return layer.gradient.abs()


def random(layer: Layer) -> Tensor:
    """Uniform [0, 1) draws, a function of (seed, layer, step); drawn on the CPU, so that every device agrees."""
    generator = rng.generator(layer.seed, f"sparse/{layer.name}", step=layer.step)
    return torch.rand(layer.weight.shape, generator=generator).to(layer.weight.device)


Criterion = Callable[[Layer], Tensor]
CRITERIA: dict[str, Criterion] = {"magnitude": magnitude, "gradient": gradient, "random": random}
NEEDS_GRADIENT = frozenset({"gradient"})
