"""Batches as a pure function of the step."""

from __future__ import annotations

import numpy as np
import pytest

from raysparse.data import loader
from raysparse.data.loader import batch_indices


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (10, 10), (3, 8), (1, 5), (1000, 128)])
def test_every_epoch_is_a_permutation(n: int, batch: int) -> None:
    stream = np.concatenate([batch_indices(n, batch, 0, step) for step in range(2 * n // batch + 3)])
    for epoch in range(2):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))
    if n >= 10:
        assert (stream[:n] != stream[n : 2 * n]).any()


def test_it_depends_on_seed_and_step_and_on_nothing_else() -> None:
    forward = [batch_indices(100, 16, 3, step).tolist() for step in range(20)]
    loader._latest.clear()
    backward = [batch_indices(100, 16, 3, step).tolist() for step in reversed(range(20))][::-1]
    assert forward == backward
    assert batch_indices(100, 16, 4, 0).tolist() != forward[0]
    assert batch_indices(100, 16, 3, 0).dtype == np.int64


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_ranks_share_the_global_batch(world_size: int) -> None:
    for step in range(5):
        shares = [batch_indices(30, 8, 1, step, rank, world_size) for rank in range(world_size)]
        assert np.concatenate(shares).tolist() == batch_indices(30, 8, 1, step).tolist()


def test_the_result_is_the_callers() -> None:
    batch_indices(50, 50, 0, 0)[:] = -1
    assert sorted(batch_indices(50, 50, 0, 0)) == list(range(50))


@pytest.mark.parametrize("bad", [(0, 4, 0, 0), (9, 0, 0, 0), (9, 4, 0, -1), (9, 5, 0, 0, 0, 2), (9, 4, 0, 0, 2, 2)])
def test_what_cannot_be_is_refused(bad: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"need n|must divide"):
        batch_indices(*bad)
