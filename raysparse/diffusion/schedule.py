"""The forward process: how much noise an example has at each timestep."""

from __future__ import annotations

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
        # Not diffusers' scheduler, for these lines: its import is .6 of the 5.5 CPU s of a trial's start.
        self.timesteps = timesteps
        if beta_schedule == "linear":
            betas = torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float32)
        else:
            betas = torch.linspace(beta_start**0.5, beta_end**0.5, timesteps, dtype=torch.float32).square()
        self.alphas_cumprod: Tensor = (1 - betas).cumprod(0)
        first, last = self.alphas_cumprod[0].item(), self.alphas_cumprod[-1].item()
        if first == 1 or last == 0:  # sampling divides by sqrt(1 - alpha) and sqrt(alpha)
            raise UsageError(
                f"beta_start {beta_start} and beta_end {beta_end} over {timesteps} timesteps make alphas_cumprod "
                f"{first:g} at the first and {last:g} at the last, in float32: "
                + ("raise beta_start above 1e-7" if first == 1 else "lower beta_end")
            )

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t like x0 [B, ...], from noise eps [B, ...] and timesteps t int64 [B]."""
        self.alphas_cumprod = self.alphas_cumprod.to(x0.device)  # once: a copy at each step would wait for the device
        with torch.autocast(x0.device.type, enabled=False):
            alpha = self.alphas_cumprod.to(x0.dtype)[t.to(x0.device)].view(-1, *[1] * (x0.ndim - 1))
            return alpha.sqrt() * x0 + (1 - alpha).sqrt() * eps
