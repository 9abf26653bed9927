"""Classifier-free guidance against two separate passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raysparse import rng
from raysparse.diffusion import ddim
from raysparse.diffusion.guidance import guided
from raysparse.diffusion.schedule import NoiseSchedule

NULL = 3


def model(x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
    """Of each row alone: x, its timestep and its label."""
    return torch.sin(x * (labels[:, None] + 1)) + timesteps[:, None] / 1000


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_it_is_the_sum_of_two_passes(scale: float) -> None:
    x = torch.randn(5, 4, generator=rng.generator(0, "guidance"))
    t, labels = torch.tensor([0, 7, 99, 500, 999]), torch.tensor([0, 1, 2, 1, 0])
    null = model(x, t, torch.full_like(labels, NULL))
    expected = null + scale * (model(x, t, labels) - null)
    torch.testing.assert_close(guided(model, scale, NULL)(x, t, labels=labels), expected)


def test_sampling_with_scale_1_is_sampling_without() -> None:
    schedule, noise = NoiseSchedule(), torch.randn(2, 4, generator=rng.generator(0, "guidance"))
    cond = {"labels": torch.tensor([2, 0])}
    plain = ddim.sample(model, schedule, noise, steps=7, cond=cond)
    torch.testing.assert_close(ddim.sample(guided(model, 1.0, NULL), schedule, noise, steps=7, cond=cond), plain)
    strong = ddim.sample(guided(model, 3.0, NULL), schedule, noise, steps=7, cond=cond)
    assert not torch.allclose(strong, plain)
