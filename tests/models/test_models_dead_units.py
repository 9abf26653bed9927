"""Units that a mask has emptied go, and what a block computes stays."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from raysparse.models import _dead_units, uvit
from raysparse.sparse import SparseEngine

seeds = st.integers(0, 2**31)


def thinned(layer: nn.Linear, block: int, density: float, draw: torch.Generator) -> nn.Linear:
    """Whole blocks of its weights are 0; its bias is drawn."""
    with torch.no_grad():
        layer.weight.normal_(generator=draw).div_(layer.in_features**0.5)
        units = torch.rand(layer.out_features // block, layer.in_features // block, generator=draw) < density
        layer.weight.mul_(units.repeat_interleave(block, 0).repeat_interleave(block, 1))
        if layer.bias is not None:
            layer.bias.normal_(generator=draw)
    return layer


def test_by_hand() -> None:
    first, second = nn.Linear(2, 4), nn.Linear(4, 1)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 0.0], [0.0, 4.0]]))
        first.bias.copy_(torch.tensor([0.0, 5.0, 0.0, 1.0]))
        second.weight.copy_(torch.tensor([[1.0, 2.0, 0.0, 3.0]]))  # the third is read by nothing, the second reads none
        second.bias.fill_(1.0)
    _dead_units.remove_neurons(first, second, torch.relu)
    assert first.weight.tolist() == [[1.0, 2.0], [0.0, 4.0]]
    assert first.bias.tolist() == [0.0, 1.0]
    assert second.weight.tolist() == [[1.0, 3.0]]
    assert second.bias.tolist() == [1.0 + 2 * 5]
    assert (first.out_features, second.in_features) == (2, 2)


@settings(max_examples=60)
@given(density=st.tuples(st.floats(0, 1), st.floats(0, 1)), block=st.sampled_from([1, 2, 4]), seed=seeds)
def test_neurons(density: tuple[float, float], block: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    first = thinned(nn.Linear(8, 16), block, density[0], draw)
    second = thinned(nn.Linear(16, 4), block, density[1], draw)
    x = torch.randn(5, 8, generator=draw)
    want = second(F.gelu(first(x)))
    alive = int((second.weight.any(0) & first.weight.any(1)).sum())
    _dead_units.remove_neurons(first, second, F.gelu)
    assert first.out_features == second.in_features == max(1, alive)
    assert torch.allclose(second(F.gelu(first(x))), want, rtol=0, atol=1e-5)


@settings(max_examples=60)
@given(density=st.tuples(st.floats(0, 1), st.floats(0, 1)), block=st.sampled_from([1, 4]), seed=seeds)
def test_heads(density: tuple[float, float], block: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    found = uvit.Block(uvit.Config(embed_dim=16, num_heads=4))
    thinned(found.qkv, block, density[0], draw)
    thinned(found.proj, block, density[1], draw)
    x = torch.randn(2, 5, 16, generator=draw)
    want = found._attention(x)
    v, read = found.qkv.weight[32:].view(4, -1).any(1), found.proj.weight.T.reshape(4, -1).any(1)
    found.heads = _dead_units.remove_heads(found.qkv, found.proj, found.heads)
    assert found.heads == max(1, int((v & read).sum()))
    assert found.qkv.out_features == 3 * found.proj.in_features == 3 * 4 * found.heads
    assert torch.allclose(found._attention(x), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("classes", [None, 3])
def test_a_whole_model(classes: int | None) -> None:
    config = uvit.Config(sample_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=classes)
    model = uvit.build(config, seed=0)
    SparseEngine(model, torch.optim.SGD(model.parameters()), method="static", sparsity=0.9, pattern="block", block=16)
    with torch.no_grad():
        for block in (*model.early, model.middle, *model.late):
            block.fc1.bias.normal_(generator=torch.Generator().manual_seed(0))
    given = uvit.example(config, batch=3, points=1)
    given["x"].normal_(generator=torch.Generator().manual_seed(1))
    smaller = copy.deepcopy(model)
    smaller.remove_dead_units()
    sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (smaller, model)]
    assert sizes[0] < 0.7 * sizes[1]
    with torch.no_grad():
        want, got = model(**given), smaller(**given)
    assert float((got - want).abs().max()) < 1e-5 * float(want.abs().max())


@pytest.mark.usefixtures("compiler")
def test_the_runtime_on_a_cpu_removes_them() -> None:
    model = uvit.build(uvit.Config(sample_size=8, embed_dim=64, depth=2, num_heads=4), seed=0)
    with torch.no_grad():
        model.middle.fc2.weight[:, 16:] = 0
    fast = uvit.sparse_runtime(model)
    assert isinstance(fast, uvit.UViT)
    assert fast.middle.fc1.out_features == 16
    assert model.middle.fc1.out_features == 256
