"""What every file in sparse/patterns has to keep, found by its name."""

from __future__ import annotations

import math

import pytest
import torch

from raysparse import plugins
from raysparse.sparse.settings import Sparse

SHAPES = [(8, 12), (24, 8), (5, 7), (16, 4, 1, 1), (8, 8, 3, 3), (4, 4), (1, 8)]


def built(name):
    plugin = plugins.load("patterns", name)
    settings = Sparse(pattern=name, sparsity=0.5, block=4, m=4)
    for shape in SHAPES:
        if plugin.MATRICES_ONLY and math.prod(shape[2:]) > 1:
            continue
        pattern = plugin.of(shape, settings)
        if isinstance(pattern, str):
            assert "divide" in pattern, "a refusal says why, for a list of layers"
        else:
            yield shape, pattern


@pytest.mark.parametrize("name", plugins.names("patterns"))
def test_units_are_equal_parts_of_a_layer(name):
    assert list(built(name))
    for shape, pattern in built(name):
        ones = pattern.total(torch.ones(shape))
        assert ones.shape == pattern.units
        assert (ones == pattern.size).all()
        assert math.prod(pattern.units) * pattern.size == math.prod(shape)
        numbers = torch.arange(1.0, math.prod(pattern.units) + 1).reshape(pattern.units)
        spread = pattern.spread(numbers)
        assert spread.shape == shape
        assert torch.equal(pattern.total(spread), numbers * pattern.size)
        assert torch.equal(pattern.of_mask(pattern.spread(numbers % 2 == 0)), numbers % 2 == 0)


@pytest.mark.parametrize("name", plugins.names("patterns"))
def test_masks_keep_the_pattern_and_the_count(name):
    draw = torch.Generator().manual_seed(1)
    for _, pattern in built(name):
        total = math.prod(pattern.units)
        count = max(1, total // 2)
        units = pattern.first(torch.rand(pattern.units, generator=draw), count)
        for _ in range(20):
            mask = pattern.spread(units)
            assert mask.dtype == torch.bool
            assert int(units.sum()) == count == pattern.count(int(mask.sum()))
            assert pattern.valid(mask)
            assert torch.equal(pattern.of_mask(mask), units)
            kept = pattern.pruned(units, torch.rand(pattern.units, generator=draw), count // 2)
            assert int(kept.sum()) == count - count // 2
            assert not (kept & ~units).any()
            units = pattern.grown(kept, torch.rand(pattern.units, generator=draw), count // 2)
            assert not (kept & ~units).any()


@pytest.mark.parametrize("name", [name for name in plugins.names("patterns") if name != "element"])
def test_a_broken_mask_is_told(name):
    for shape, pattern in built(name):
        mask = pattern.spread(pattern.first(torch.rand(pattern.units), max(1, math.prod(pattern.units) // 2))).clone()
        place = tuple(mask.nonzero()[0])
        mask[place] = False
        if pattern.size > 1 or name == "nm":
            assert not pattern.valid(mask), shape


@pytest.mark.parametrize("name", plugins.names("patterns"))
def test_other_memory_formats_give_the_same(name):
    for shape, pattern in built(name):
        values = torch.randn(shape)
        other = values.mT.contiguous().mT if len(shape) == 2 else values.to(memory_format=torch.channels_last)
        assert torch.equal(pattern.total(values), pattern.total(other))
