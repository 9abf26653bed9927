"""Masks per range of timesteps: exact, nested, each in its own pass, and as a model of its own would be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from raysparse.errors import UsageError
from raysparse.sparse import SparseEngine
from raysparse.sparse.ranges import ByTimestep

RANGES = "0-100:0.25,100-400:0.9,400-1000:0.6"


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 32), nn.Linear(32, 8)
        self.calls = []

    def forward(self, x, timesteps, *, labels=None):
        self.calls.append(timesteps.tolist())
        shift = 0 if labels is None else labels[:, None].float()
        return self.two(torch.tanh(self.one(x))) + timesteps[:, None] / 1000 + shift


def build(**settings):
    torch.manual_seed(0)
    model = Denoiser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = SparseEngine(model, optimizer, method="timesteps", **{"ranges": RANGES, **settings})
    return model, optimizer, engine


def test_counts_are_exact_and_masks_nested():
    _, _, engine = build()
    network = engine.network(Denoiser())
    total = 8 * 32 * 2
    for masks, sparsity in zip(network.masks, (0.25, 0.9, 0.6), strict=True):
        assert sum(int(mask.sum()) for mask in masks.values()) == round((1 - sparsity) * total)
    low, high, middle = network.masks
    for name, mask in engine.masks.items():
        assert torch.equal(low[name], mask)
        assert not (high[name] & ~middle[name]).any()
        assert not (middle[name] & ~low[name]).any()
    assert engine.sparsity == 0.25


def test_a_batch_goes_through_one_pass_per_range_and_comes_back_in_its_order():
    model, _, engine = build()
    network = engine.network(model)
    x, t = torch.randn(6, 8), torch.tensor([500, 99, 100, 0, 399, 999])
    labels = torch.arange(6)
    model.calls.clear()
    found = network(x, t, labels=labels)
    assert model.calls == [[99, 0], [100, 399], [500, 999]]
    for index, of in enumerate([2, 0, 1, 0, 1, 2]):
        alone = copy.deepcopy(model)
        for name, mask in network.masks[of].items():
            alone.get_parameter(name).data.mul_(mask)
        expected = alone(x[index : index + 1], t[index : index + 1], labels=labels[index : index + 1])
        assert torch.allclose(found[index : index + 1], expected, atol=1e-6)
    model.calls.clear()
    network(x, torch.full((6,), 250), labels=labels)
    assert len(model.calls) == 1


def test_a_weight_learns_from_the_ranges_that_use_it():
    model, _, engine = build()
    network = engine.network(model)
    x = torch.randn(4, 8)
    network(x, torch.tensor([150, 200, 300, 399])).square().sum().backward()
    for name, mask in network.masks[1].items():
        gradient = model.get_parameter(name).grad
        assert (gradient[~mask] == 0).all()
        assert gradient[mask].any()
    both = torch.tensor([150, 999, 300, 0])
    model.zero_grad()
    (network(x, both).square().sum()).backward()
    whole = model.one.weight.grad.clone()
    model.zero_grad()
    for row in range(4):
        network(x[row : row + 1], both[row : row + 1]).square().sum().backward()
    assert torch.allclose(whole, model.one.weight.grad, atol=1e-5)


def test_training_keeps_everything_outside_all_masks_at_zero():
    model, optimizer, engine = build()
    network = engine.network(model)
    masks = engine.masks
    for step in range(20):
        draw = torch.Generator().manual_seed(step)
        x, t = torch.randn(16, 8, generator=draw), torch.randint(0, 1000, (16,), generator=draw)
        optimizer.zero_grad()
        (network(x, t) - x).square().mean().backward()
        engine.mask_gradients()
        optimizer.step()
        engine.after_step()
    for name, mask in engine.masks.items():
        assert torch.equal(mask, masks[name])
        assert (model.get_parameter(name)[~mask] == 0).all()


def test_another_methods_network_is_the_model_itself():
    model = Denoiser()
    engine = SparseEngine(model, torch.optim.AdamW(model.parameters()), method="rigl")
    assert engine.network(model) is model


def test_the_null_label_is_the_models():
    model = Denoiser()
    model.null_label = 7
    assert ByTimestep(model, [{}], [1000]).null_label == 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranges": "0-500:0.5,400-1000:0.5"}, "overlap at 400"),
        ({"ranges": "0-500:0.5,600-1000:0.5"}, "leave out timesteps at 500"),
        ({"ranges": "10-1000:0.5"}, "leave out timesteps at 0"),
        ({"ranges": "0-0:0.5,0-1000:0.5"}, "0-0 is empty"),
        ({"ranges": "0-1000"}, "give first-end:sparsity"),
        ({"ranges": "0-1000:1.5"}, "give first-end:sparsity"),
        ({"ranges": {500: 0.5}}, "ranges.*valid string"),
        ({"ranges": "0-1000:0.5", "sparsity": 0.9}, "densest of the ranges has 0.5; leave it out"),
        ({"ranges": "0-500:0.5,500-1000:0.6", "pattern": "nm"}, "sparsity 0.6 leaves 1.6 of 4 weights"),
        ({"prune_ratio": 0.5}, "'timesteps' has no prune_ratio"),
        ({"ranges": "0-500:0.5,500-1000:0.999"}, "each layer keeps"),
    ],
)
def test_bad_ranges_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        build(**settings)


def test_masks_of_other_settings_are_refused():
    state = build()[2].state_dict()
    state["ranges"].reverse()
    with pytest.raises(UsageError, match="of other settings or of another seed"):
        build()[2].load_state_dict(state)
