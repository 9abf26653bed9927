from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raysparse.train import mask_sample


def test_small_masks_are_kept_whole() -> None:
    masks = {"a": torch.tensor([[True, False, True]]), "b": torch.tensor([False] * 8 + [True])}
    # 101 -> 1010 0000; nine bits -> 0000 0000 1000 0000
    assert json.loads(mask_sample.sample(masks) or "") == {"a": "a0", "b": "0080"}


def test_dense_has_none() -> None:
    assert mask_sample.sample({}) is None


def test_large_masks_are_sampled_at_the_same_places() -> None:
    draws = torch.Generator().manual_seed(0)
    one = {"w": torch.rand(1000, 1000, generator=draws) < 0.1, "v": torch.rand(200, generator=draws) < 0.1}
    texts = [mask_sample.sample(one), mask_sample.sample({name: mask.clone() for name, mask in one.items()})]
    assert texts[0] == texts[1]
    (places, _) = mask_sample.positions((1_000_000, 200))
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(json.loads(texts[0] or "")["w"]), np.uint8))[: len(places)]
    assert (bits.astype(bool) == one["w"].reshape(-1).numpy()[places]).all()
    # 410 expected active of 4,096; four standard deviations of a binomial are 77
    assert abs(int(bits.sum()) - 0.1 * len(places)) < 77


@given(st.lists(st.integers(1, 300_000), min_size=1, max_size=6))
def test_positions_are_distinct_inside_their_layers_and_shared_out_by_size(sizes: list[int]) -> None:
    found = mask_sample.positions(tuple(sizes))
    total = sum(sizes)
    for places, size in zip(found, sizes, strict=True):
        assert (np.diff(places) > 0).all()
        assert len(places) == 0 or (places[0] >= 0 and places[-1] < size)
        if total > mask_sample.POSITIONS:
            assert abs(len(places) - mask_sample.POSITIONS * size / total) <= max(8, 0.02 * mask_sample.POSITIONS)
        else:
            assert len(places) == size


@pytest.mark.parametrize("stride", [2, 64, 96, 224])
def test_positions_favour_no_column(stride: int) -> None:
    (places,) = mask_sample.positions((stride * 10_000,))
    counts = np.bincount(places % stride, minlength=stride)
    assert counts.min() > 0.3 * len(places) / stride
