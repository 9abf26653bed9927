"""Draws are a function of their key."""

from __future__ import annotations

import torch

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


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    torch.rand(3, generator=rng.generator(0, "x"))
    assert torch.equal(before, torch.get_rng_state())
