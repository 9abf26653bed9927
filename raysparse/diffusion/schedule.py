"""The forward process: how much noise an example has at each timestep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raysparse.errors import UsageError, unknown

BETA_SCHEDULES = ("linear", "scaled_linear")


class NoiseSchedule:
    """x_t = sqrt(alphas_cumprod_t) x_0 + sqrt(1 - alphas_cumprod_t) eps, for t in 0 .. timesteps - 1.

    beta_schedule: "linear", or "scaled_linear" (linear in sqrt(beta), what Latent Diffusion calls linear). The defaults
    are ChiroDiff's; Latent Diffusion has scaled_linear, .0015-.0195. alphas_cumprod: float32 [timesteps], falling.
    """

    def __init__(
        self,
        beta_schedule: str = "linear",
        beta_start: float = 1e-4,
        beta_end: float = 2e-2,
        timesteps: int = 1000,
    ) -> None:
        if beta_schedule not in BETA_SCHEDULES:
            raise UsageError(unknown("beta_schedule", beta_schedule, BETA_SCHEDULES))
        if timesteps < 1:
            raise UsageError(f"timesteps must be at least 1, got {timesteps}")
        if not 0 < beta_start <= beta_end < 1:
            raise UsageError(f"betas must satisfy 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}")
        # imported here: 1.7 s beside torch's own, and only a schedule that is made needs it
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        self.timesteps = timesteps
        self._scheduler: Any = DDPMScheduler(
            num_train_timesteps=timesteps, beta_schedule=beta_schedule, beta_start=beta_start, beta_end=beta_end
        )
        self.alphas_cumprod: Tensor = self._scheduler.alphas_cumprod

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t like x0 [B, ...], from noise eps [B, ...] and timesteps t int64 [B]."""
        with torch.autocast(x0.device.type, enabled=False):
            noisy: Tensor = self._scheduler.add_noise(x0, eps, t)
        return noisy
