"""Layers that are alike and on a GPU are chosen for in one call, and get the masks that each would get alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from raysparse.sparse import SparseEngine, masks, topology

SETTINGS = {"element": {}, "block": {"block": 8}, "diagonal": {}, "nm": {"sparsity": 0.5, "m": 4}}


def layers() -> nn.Module:
    """Five linear layers of two shapes, two convolutions of one (one of them channels_last); equal numbers in each."""
    alike = [nn.Linear(16, 32) for _ in range(4)], [nn.Conv2d(8, 8, 3) for _ in range(2)]
    model = nn.Sequential(*alike[0][:2], nn.Linear(32, 32), *alike[0][2:], *alike[1])
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(1, 9, parameter.shape, generator=draw).float())  # ties
        alike[1][1].weight.data = alike[1][1].weight.data.to(memory_format=torch.channels_last)
    return model


def updated(model: nn.Module, method: str, pattern: str) -> SparseEngine:
    """After three updates."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    settings: dict[str, Any] = {"sparsity": 0.75, "update_interval": 2, "prune_ratio": 0.4} | SETTINGS[pattern]
    engine = SparseEngine(model, optimizer, method=method, pattern=pattern, **settings)
    draw = torch.Generator().manual_seed(1)
    for _ in range(7):
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = torch.randint(-4, 5, parameter.shape, generator=draw).float()
            if number == 2:  # a layer that the loss does not use
                parameter.grad = None
        engine.mask_gradients()
        optimizer.step()
        engine.after_step()
    assert engine.updates == 3
    return engine


@pytest.mark.parametrize("pattern", SETTINGS)
@pytest.mark.parametrize("method", ["rigl", "magran", "mixed", "momentum", "set"])
@pytest.mark.parametrize("together", [topology._TOGETHER, 1100, 1])  # all of a kind, two linear layers, one
def test_chosen_together_they_get_the_masks_of_each_alone(
    method: str, pattern: str, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = layers()
    alone = updated(copy.deepcopy(model), method, pattern)
    monkeypatch.setattr(masks, "on_host", lambda _: False)  # as on a GPU
    monkeypatch.setattr(topology, "_TOGETHER", together)
    found = updated(model, method, pattern)
    assert found.replaced == alone.replaced > 0
    assert list(found.masks) == list(alone.masks)
    for name, mask in found.masks.items():
        assert torch.equal(mask, alone.masks[name])
        assert mask.stride() == model.get_parameter(name).stride()
        assert not model.get_parameter(name)[~mask].any()


def test_a_call_serves_all_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, whole = [], torch.vmap

    def counted(function: Any, **how: Any) -> Any:
        calls.append(function.__name__)
        return whole(function, **how)

    monkeypatch.setattr(masks, "on_host", lambda _: False)
    monkeypatch.setattr(torch, "vmap", counted)
    updated(layers(), "rigl", "element")
    assert calls == ["pruned", "grown"] * 2 * 3  # of the four linear layers and of the convolutions, three updates
