"""Parameters, total and active."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from raysparse.metrics import params


def model() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 4, bias=False))
    net.register_buffer("frequencies", torch.zeros(100))
    return net


def test_total_leaves_buffers_out_and_counts_a_shared_tensor_once():
    net = model()
    assert params.count(net) == 20 + 5 + 10 + 20
    net[2].weight = nn.Parameter(net[0].weight.data)
    net.twin = net[0]
    assert params.count(net) == 55


def test_active_counts_mask_and_all_of_what_has_none():
    net = model()
    mask = torch.zeros(5, 4, dtype=torch.bool)
    mask[0] = True
    assert params.active(net, {"0.weight": mask}) == 4 + 35
    assert params.active(net, {}) == params.count(net)
    assert params.active_at(net, {"0.weight": 0.2, "2.weight": 0.1}) == 4 + 5 + 10 + 2


def test_a_name_that_the_model_lacks_is_an_error():
    with pytest.raises(ValueError, match=r"lacks: 9\.weight"):
        params.active(model(), {"9.weight": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"lacks: 9\.weight"):
        params.active_at(model(), {"9.weight": 0.5})
