"""What comes out of a model is not rounded to bfloat16."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from raysparse import plugins
from raysparse.models import _float32_layers

PICTURES = ["uvit", "ddpm_unet", "latent_unet"]
HALF = torch.autocast("cpu", torch.bfloat16)


def plain(layer: nn.Module) -> nn.Module:
    """The layer as PyTorch's own class computes it."""
    found = copy.deepcopy(layer)
    found.__class__ = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    return found


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (_float32_layers.Conv2d(5, 3, 3, padding=1), drawn(2, 5, 6, 7)),
        (_float32_layers.Conv2d(4, 4, 1, bias=False), drawn(2, 4, 6, 7)),
        (_float32_layers.Linear(9, 4), drawn(2, 3, 9)),
    ],
    ids=str,
)
def test_a_layer_under_autocast_is_as_without(layer: nn.Module, x: Tensor) -> None:
    half = x.bfloat16()
    with HALF:
        got, rounded = layer(half), plain(layer)(half)
    assert got.dtype == torch.float32
    assert torch.equal(got, plain(layer)(half.float()))
    assert torch.equal(layer(x), plain(layer)(x))
    assert rounded.dtype == torch.bfloat16
    inside = copy.deepcopy(layer).bfloat16()(half)
    assert inside.dtype == torch.float32, "weights may be bfloat16 too"
    assert torch.allclose(inside, got, atol=0.05)


@pytest.mark.parametrize("name", PICTURES)
def test_a_prediction_under_autocast_is_finer_than_bfloat16(name: str) -> None:
    module = plugins.load("models", name)
    model = module.build(module.Config(**module.SMALL), seed=0)
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.any():
                weight.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
        given = module.example(model.config, batch=2, points=1)
        given["x"] += drawn(*given["x"].shape)
        with HALF:
            got = model(**given)
        want = model(**given)
    assert got.dtype == torch.float32
    assert not torch.equal(got, got.bfloat16().float())
    assert 0 < float((got - want).abs().max()) < 0.05 * float(want.abs().max())
