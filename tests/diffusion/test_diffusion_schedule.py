from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from raysparse import rng
from raysparse.diffusion.schedule import NoiseSchedule
from raysparse.errors import UsageError


def test_betas_by_hand() -> None:
    linear = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
    np.testing.assert_allclose(NoiseSchedule().alphas_cumprod.numpy(), linear, rtol=1e-4)
    scaled = np.cumprod(1 - np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2)
    schedule = NoiseSchedule("scaled_linear", 0.0015, 0.0195)
    np.testing.assert_allclose(schedule.alphas_cumprod.numpy(), scaled, rtol=1e-4)
    assert schedule.alphas_cumprod.dtype == torch.float32


@pytest.mark.parametrize("t", [0, 250, 999])
@pytest.mark.parametrize("kind", ["linear", "scaled_linear"])
def test_noised_values_have_the_schedules_mean_and_variance(kind: str, t: int) -> None:
    schedule = NoiseSchedule(kind)
    x0 = torch.full((100_000, 1), 2.0)
    eps = torch.randn(x0.shape, generator=rng.generator(0, "test eps"))
    noisy = schedule.add_noise(x0, eps, torch.full((100_000,), t))
    alpha = float(schedule.alphas_cumprod[t])
    assert float(noisy.mean()) == pytest.approx(2 * alpha**0.5, abs=0.015)
    assert float(noisy.var()) == pytest.approx(1 - alpha, rel=0.03)


def test_each_example_has_its_own_timestep() -> None:
    schedule = NoiseSchedule()
    x0, eps = torch.zeros(3, 4, 2), torch.ones(3, 4, 2)
    noisy = schedule.add_noise(x0, eps, torch.tensor([0, 500, 999]))
    want = (1 - schedule.alphas_cumprod[[0, 500, 999]]).sqrt()
    torch.testing.assert_close(noisy, want[:, None, None].expand(3, 4, 2))
    assert noisy.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"beta_schedule": "liner"}, "did you mean 'linear'"),
        ({"timesteps": 0}, "timesteps must be at least 1, got 0"),
        ({"beta_start": 0.0}, "0 < beta_start"),
        ({"beta_end": 1.0}, "beta_end < 1"),
        ({"beta_start": 0.02, "beta_end": 0.01}, "beta_start <= beta_end"),
        ({"beta_start": 1e-8}, "raise beta_start"),  # 1 - beta is 1 in float32, and sampling would divide by 0
        ({"beta_end": 0.5}, "lower beta_end"),  # alphas_cumprod ends at 0
    ],
)
def test_bad_settings(settings: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        NoiseSchedule(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "start", "end"), [("linear", 1e-4, 2e-2), ("scaled_linear", 0.0015, 0.0195)])
@pytest.mark.parametrize("timesteps", [1, 50, 1000])
def test_it_is_diffusers_schedule_bit_for_bit(kind: str, start: float, end: float, timesteps: int) -> None:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    theirs = DDPMScheduler(num_train_timesteps=timesteps, beta_schedule=kind, beta_start=start, beta_end=end)
    ours = NoiseSchedule(kind, start, end, timesteps)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    t = torch.arange(timesteps)
    x0, eps = (torch.randn(timesteps, 5, 3, generator=rng.generator(0, name)) for name in ("x0", "eps"))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        given = (x0.to(dtype), eps.to(dtype), t)
        assert torch.equal(ours.add_noise(*given), theirs.add_noise(*given))


def test_a_schedule_imports_no_diffusers() -> None:
    check = "import sys, raysparse.diffusion.schedule as s; s.NoiseSchedule(); sys.exit('diffusers' in sys.modules)"
    subprocess.run([sys.executable, "-W", "error", "-c", check], check=True, timeout=120)
