"""Draws are a function of their key."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from hypothesis import given
from hypothesis import strategies as st

from raysparse import rng


def test_the_same_key_gives_the_same_draw_and_any_other_another() -> None:
    def draw(*args: object, **kwargs: int) -> float:
        return float(torch.rand((), generator=rng.generator(*args, **kwargs)))

    first = draw(0, "noise", rank=0, step=5)
    assert draw(0, "noise", rank=0, step=5) == first
    others = [
        draw(1, "noise", step=5),
        draw(0, "mask", step=5),
        draw(0, "noise", rank=1, step=5),
        draw(0, "noise", step=6),
    ]
    assert len({first, *others}) == 5


def test_keys_are_63_bits_and_parts_do_not_run_together() -> None:
    assert 0 <= rng.key(0, "a") < 2**63
    assert rng.key(1, "a", rank=11, step=1) != rng.key(1, "a", rank=1, step=11)
    assert rng.numpy_generator(0, "a").integers(1 << 30) == rng.numpy_generator(0, "a").integers(1 << 30)


def splitmix64(state: int) -> Iterator[int]:
    """As published, in Python's own numbers."""
    whole = (1 << 64) - 1
    while True:
        state = z = (state + 0x9E3779B97F4A7C15) & whole
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & whole
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & whole
        yield z ^ (z >> 31)


def test_the_published_first_numbers() -> None:
    assert [*itertools.islice(splitmix64(0), 3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@given(st.integers(0, 2**32), st.text(max_size=5), st.integers(0, 10**9))
def test_uniform_draws_are_the_published_ones(seed: int, purpose: str, step: int) -> None:
    drawn = rng.uniform(seed, purpose, (2, 5), step=step)
    expected = itertools.islice(splitmix64(rng.key(seed, purpose, step=step)), 10)
    assert drawn.dtype == torch.float32
    assert drawn.tolist() == torch.tensor([(z >> 40) / 2**24 for z in expected]).view(2, 5).tolist()


def test_uniform_draws_are_even_and_those_of_two_keys_have_nothing_to_do_with_each_other() -> None:
    count = 1 << 20
    draws = [rng.uniform(0, purpose, (count,), step=step) for purpose, step in (("a", 1), ("a", 2), ("b", 1))]
    for draw in draws:
        assert draw.min() >= 0
        assert draw.max() < 1
        histogram = draw.histc(256, 0, 1)
        chi2 = float(((histogram - count / 256) ** 2 / (count / 256)).sum())
        assert abs(chi2 - 255) < 5 * (2 * 255) ** 0.5
    lagged = [draws[0][1:], draws[0][2:], *draws[1:]]
    for other in lagged:
        pair = torch.stack((draws[0][: len(other)], other))
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 5 / count**0.5


def test_uniform_draws_are_made_where_they_are_wanted() -> None:
    assert rng.uniform(0, "a", (3, 4), device="meta").device.type == "meta"
    assert rng.uniform(0, "a", (0, 4)).shape == (0, 4)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    torch.rand(3, generator=rng.generator(0, "x"))
    assert torch.equal(before, torch.get_rng_state())
