"""DDIM sampling (Song et al. 2021, equations 12 and 16) with any number of steps.

The noise levels are the schedule's own, from diffusers; the steps are the lines below, because diffusers' DDIMScheduler
rounds timesteps / steps down: asked for 600 steps of 1000 it starts at t = 599, half way down from the noise it is
given, and at 150 at t = 894. Where the steps divide the timesteps both are equal, which a test holds them to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from raysparse.diffusion.schedule import NoiseSchedule
from raysparse.errors import UsageError, unknown

SPACINGS = ("leading", "trailing", "original")


@torch.no_grad()
def sample(
    model: Callable[..., Tensor],
    schedule: NoiseSchedule,
    noise: Tensor,
    *,
    steps: int,
    eta: float = 0.0,
    cond: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
    spacing: str = "leading",
) -> Tensor:
    """x0, float32 like `noise` [B, ...], from a model that predicts eps: model(x, timesteps int64 [B], **cond).

    steps: 1 .. schedule.timesteps. eta: 0 is deterministic, 1 as noisy as DDPM; above 0 it draws from `generator`,
    which must be given. spacing: see `timesteps`. Nothing is clipped. The last step goes to a noise level of 0;
    with "original" to that of t = 0, as Latent Diffusion's sampler does.
    """
    if not 0 <= eta <= 1:
        raise UsageError(f"eta must be in [0, 1], got {eta}")
    if eta > 0 and generator is None:
        raise UsageError(f"eta {eta} draws noise: give a generator")
    times = timesteps(schedule.timesteps, steps, spacing=spacing)
    levels = schedule.alphas_cumprod.tolist()  # once: on a GPU a level read at each step would wait for all before it
    last = levels[0] if spacing == "original" else 1.0
    x = noise.float()
    for t, following in zip(times, [*times[1:], None], strict=True):
        alpha, next_alpha = levels[t], last if following is None else levels[following]
        eps = model(x, torch.full((len(x),), t, dtype=torch.int64, device=x.device), **(cond or {})).float()
        x = _step(x, eps, alpha, next_alpha, eta, generator)
    return x


def timesteps(total: int, steps: int, *, spacing: str = "leading") -> list[int]:
    """The timesteps of 0 .. total - 1 that sampling visits: falling, different, evenly spread.

    "leading" ends at 0 and starts at T - T / steps, so with very few steps "trailing", which starts at T - 1, is the
    better choice. "original" is Latent Diffusion's own, every (T // steps)-th from 1: where `steps` does not divide T
    they are more than asked for, 167 for 150 of 1000 (PAPER: Latent Diffusion). UsageError: steps out of range.
    """
    if not 1 <= steps <= total:
        raise UsageError(f"DDIM takes 1 to {total} steps, as many as the schedule has timesteps; got {steps}")
    if spacing not in SPACINGS:
        raise UsageError(unknown("spacing", spacing, SPACINGS))
    if spacing == "trailing":
        return [total - 1 - index * total // steps for index in range(steps)]
    if spacing == "leading":
        return [index * total // steps for index in reversed(range(steps))]
    times = list(range(0, total, total // steps))[::-1]
    # Their code adds 1 to each and fails where that leaves the schedule (333 or 1000 of 1000); there nothing is added.
    return [time + min(1, total - 1 - times[0]) for time in times]


def _step(
    x: Tensor, eps: Tensor, alpha: float, next_alpha: float, eta: float, generator: torch.Generator | None
) -> Tensor:
    """From noise level alpha to next_alpha (both alphas_cumprod)."""
    variance = eta**2 * (1 - next_alpha) / (1 - alpha) * (1 - alpha / next_alpha)
    x0 = (x - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)
    x = math.sqrt(next_alpha) * x0 + math.sqrt(max(0.0, 1 - next_alpha - variance)) * eps
    if variance > 0:
        x = x + math.sqrt(variance) * torch.randn(x.shape, generator=generator, device=x.device)
    return x
