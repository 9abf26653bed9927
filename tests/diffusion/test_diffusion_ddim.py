from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from raysparse import rng
from raysparse.diffusion import ddim
from raysparse.diffusion.schedule import NoiseSchedule
from raysparse.errors import UsageError
from raysparse.models import chirodiff

SCHEDULE = NoiseSchedule()


class Oracle(nn.Module):
    """Knows x0, so its eps is perfect at any x and t."""

    def __init__(self, x0: Tensor, schedule: NoiseSchedule = SCHEDULE) -> None:
        super().__init__()
        self.x0, self.schedule, self.seen = x0, schedule, list[int]()

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        self.seen.append(int(timesteps[0]))
        alpha = self.schedule.alphas_cumprod[timesteps].view(-1, 1, 1)
        return (x - alpha.sqrt() * self.x0) / (1 - alpha).sqrt()


class Bent(nn.Module):
    """A smooth, imperfect prediction that depends on x, t and a condition."""

    def forward(self, x: Tensor, timesteps: Tensor, shift: float = 0.1) -> Tensor:
        return torch.sin(x + shift) + timesteps.view(-1, 1, 1) / 2000


def noise(*shape: int) -> Tensor:
    return torch.randn(shape or (4, 6, 3), generator=rng.generator(0, "test noise"))


def diffusers_loop(steps: int, eta: float, generator: torch.Generator, **settings: Any) -> Tensor:
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear", clip_sample=False, **settings)
    scheduler.set_timesteps(steps)
    x, model = noise(), Bent()
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.expand(len(x))), int(t), x, eta=eta, generator=generator).prev_sample
    return x


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 150, 333, 600, 999, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_a_perfect_prediction_recovers_x0_in_any_number_of_steps(steps: int, spacing: str) -> None:
    x0 = torch.rand(4, 6, 3, generator=rng.generator(1, "test x0"))
    start = ddim.timesteps(1000, steps, spacing=spacing)[0]
    x = SCHEDULE.add_noise(x0, noise(), torch.full((4,), start))
    oracle = Oracle(x0)
    torch.testing.assert_close(ddim.sample(oracle, SCHEDULE, x, steps=steps, spacing=spacing), x0, rtol=0, atol=2e-3)
    assert len(oracle.seen) == steps


DIFFUSERS = {
    "leading": {"timestep_spacing": "leading", "set_alpha_to_one": True, "steps_offset": 0},
    "trailing": {"timestep_spacing": "trailing", "set_alpha_to_one": True, "steps_offset": 0},
    "original": {"timestep_spacing": "leading", "set_alpha_to_one": False, "steps_offset": 1},
}


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 50, 100, 200])
@pytest.mark.parametrize("spacing", ddim.SPACINGS)
def test_equals_diffusers_where_the_steps_divide_the_timesteps(steps: int, eta: float, spacing: str) -> None:
    theirs = diffusers_loop(steps, eta, rng.generator(2, "eta"), **DIFFUSERS[spacing])
    ours = ddim.sample(
        Bent(), SCHEDULE, noise(), steps=steps, eta=eta, generator=rng.generator(2, "eta"), spacing=spacing
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


@given(st.integers(1, 1200), st.data(), st.sampled_from(["leading", "trailing"]))
def test_timesteps_fall_evenly_through_the_whole_range(total: int, data: Any, spacing: str) -> None:
    steps = data.draw(st.integers(1, total))
    times = ddim.timesteps(total, steps, spacing=spacing)
    gaps = [a - b for a, b in pairwise(times)]
    assert len(times) == steps
    assert times[-1] >= 0
    assert times[0] <= total - 1
    assert all(gap in (total // steps, -(-total // steps)) for gap in gaps)
    assert times[0] >= total - 1 - -(-total // steps)  # no further from pure noise than one step


@given(st.integers(1, 1200), st.data())
def test_original_timesteps_are_evenly_spaced_and_at_least_as_many(total: int, data: Any) -> None:
    steps = data.draw(st.integers(1, total))
    times = ddim.timesteps(total, steps, spacing="original")
    assert len(times) >= steps
    assert {a - b for a, b in pairwise(times)} <= {total // steps}
    assert 0 <= times[-1] <= 1
    assert times[0] <= total - 1


@pytest.mark.parametrize(("asked", "done", "first"), [(50, 50, 981), (100, 100, 991), (150, 167, 997), (200, 200, 996)])
def test_the_papers_numbers_of_steps(asked: int, done: int, first: int) -> None:
    times = ddim.timesteps(1000, asked, spacing="original")
    assert (len(times), times[0], times[-1]) == (done, first, 1)


def test_timesteps_by_hand() -> None:
    assert ddim.timesteps(1000, 5) == [800, 600, 400, 200, 0]
    assert ddim.timesteps(1000, 5, spacing="original") == [801, 601, 401, 201, 1]
    assert ddim.timesteps(1000, 5, spacing="trailing") == [999, 799, 599, 399, 199]
    assert ddim.timesteps(10, 4) == [7, 5, 2, 0]
    assert ddim.timesteps(4, 4, spacing="original") == [3, 2, 1, 0]
    assert ddim.timesteps(10, 4, spacing="original") == [9, 7, 5, 3, 1]


def test_eta_0_draws_nothing_and_repeats() -> None:
    before = torch.random.get_rng_state()
    first, second = (ddim.sample(Bent(), SCHEDULE, noise(), steps=13) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_eta_draws_from_its_generator_only() -> None:
    before = torch.random.get_rng_state()
    first, second, other = (
        ddim.sample(Bent(), SCHEDULE, noise(), steps=13, eta=1.0, generator=rng.generator(seed, "eta"))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.allclose(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_conditions_reach_the_model() -> None:
    plain, shifted = (ddim.sample(Bent(), SCHEDULE, noise(), steps=5, cond={"shift": s}) for s in (0.1, 0.9))
    assert not torch.allclose(plain, shifted)
    assert torch.equal(plain, ddim.sample(Bent(), SCHEDULE, noise(), steps=5))


def test_chirodiff_samples_do_not_depend_on_what_pads_them() -> None:
    model = chirodiff.build(chirodiff.Config(hidden=8, layers=1), seed=0)
    lengths = torch.tensor([6, 2, 4, 5])
    x = noise()
    padded = x.clone()
    padded[torch.arange(6) >= lengths[:, None]] = 100.0
    first, second = (ddim.sample(model, SCHEDULE, z, steps=10, cond={"lengths": lengths}) for z in (x, padded))
    inside = torch.arange(6) < lengths[:, None]
    assert torch.equal(first[inside], second[inside])
    assert first.dtype == torch.float32
    assert not first.requires_grad


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 1001}, "1 to 1000 steps.*got 1001"),
        ({"steps": 0}, "got 0"),
        ({"steps": 5, "eta": 1.5}, r"eta must be in \[0, 1\], got 1.5"),
        ({"steps": 5, "eta": 0.5}, "give a generator"),
        ({"steps": 5, "spacing": "leadin"}, "did you mean 'leading'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ddim.sample(Bent(), SCHEDULE, noise(), **settings)
