"""DDIM sampling (Song et al. 2021, equations 12 and 16) with any number of steps.

The noise levels are the schedule's own, from diffusers; the steps are the lines below, because diffusers' DDIMScheduler
rounds timesteps / steps down: asked for 600 steps of 1000 it starts at t = 599, half way down from the noise it is
given, and at 150 at t = 894. Where the steps divide the timesteps both are equal, which a test holds them to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raysparse.diffusion.schedule import NoiseSchedule
from raysparse.errors import UsageError, unknown

SPACINGS = ("leading", "trailing")


@torch.no_grad()
def sample(
    model: nn.Module,
    schedule: NoiseSchedule,
    noise: Tensor,
    *,
    steps: int,
    eta: float = 0.0,
    cond: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
    spacing: str = "leading",
    steps_offset: int = 0,
    set_alpha_to_one: bool = True,
) -> Tensor:
    """x0, float32 like `noise` [B, ...], from a model that predicts eps: model(x, timesteps int64 [B], **cond).

    steps: 1 .. schedule.timesteps. eta: 0 is deterministic, 1 as noisy as DDPM; above 0 it draws from `generator`,
    which must be given. spacing, steps_offset, set_alpha_to_one: as diffusers names them; the defaults are ChiroDiff's,
    Latent Diffusion has steps_offset=1 and set_alpha_to_one=False. Nothing is clipped. "leading" starts at
    t = T - T / steps, so with very few steps "trailing", which starts at T - 1, is the better choice.
    """
    if not 0 <= eta <= 1:
        raise UsageError(f"eta must be in [0, 1], got {eta}")
    if eta > 0 and generator is None:
        raise UsageError(f"eta {eta} draws noise: give a generator")
    times = timesteps(schedule.timesteps, steps, spacing=spacing, offset=steps_offset)
    levels = schedule.alphas_cumprod.double()
    last = 1.0 if set_alpha_to_one else float(levels[0])
    x = noise.float()
    for t, following in zip(times, [*times[1:], None], strict=True):
        alpha = float(levels[t])
        next_alpha = last if following is None else float(levels[following])
        eps = model(x, torch.full((len(x),), t, dtype=torch.int64, device=x.device), **(cond or {})).float()
        x = _step(x, eps, alpha, next_alpha, eta, generator)
    return x


def timesteps(total: int, steps: int, *, spacing: str = "leading", offset: int = 0) -> list[int]:
    """The `steps` timesteps of 0 .. total - 1 that sampling visits: falling, different, evenly spread."""
    if not 1 <= steps <= total:
        raise UsageError(f"DDIM takes 1 to {total} steps, as many as the schedule has timesteps; got {steps}")
    if spacing not in SPACINGS:
        raise UsageError(unknown("spacing", spacing, SPACINGS))
    if spacing == "trailing":
        return [total - 1 - index * total // steps for index in range(steps)]
    times = [index * total // steps for index in reversed(range(steps))]
    offset = min(offset, total - 1 - times[0])  # all timesteps visited: nothing to move up to
    return [time + offset for time in times]


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
