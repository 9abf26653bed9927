"""What every file in sparse/methods has to keep, found by its name."""

from __future__ import annotations

import copy
import io
import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from raysparse import plugins
from raysparse.sparse import SparseEngine

METHODS = plugins.names("methods")
PATTERNS = plugins.names("patterns")


def takes(method, pattern):
    kind = plugins.load("methods", method).Settings
    if "pattern" not in kind.model_fields:
        return pattern == "element"
    try:
        kind(pattern=pattern)
    except ValidationError:
        return False
    return True


# Every method with every pattern that it takes.
TOGETHER = [(method, pattern) for method in METHODS for pattern in PATTERNS if takes(method, pattern)]
SMALL = {"block": 4, "m": 4}


def settings_of(method, **wanted):
    """Of these settings what the method has; a sparsity that it can have where its pattern gives the density."""
    has = plugins.load("methods", method).Settings.model_fields
    if has and not takes(method, "element"):
        wanted["sparsity"] = min(0.75, round(4 * wanted.get("sparsity", 0.5)) / 4)
    if "ranges" in has:
        least = wanted.pop("sparsity", 0.5)
        wanted["ranges"] = f"0-500:{least},500-1000:{max(least, 0.75)}"
    return {k: v for k, v in wanted.items() if k in has}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 12, 3, padding=1)
        self.norm = nn.GroupNorm(2, 12)
        self.gru = nn.GRU(12, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.out = nn.Linear(16, 3)

    def forward(self, x):  # [B, L, 3]
        h = self.norm(self.conv(x.mT)).mT
        return self.out(self.gru(h)[0])


def build(method, seed=0, **settings):
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True)
    return model, optimizer, SparseEngine(model, optimizer, method=method, seed=seed, **settings)


def train(model, optimizer, engine, steps, start=0):
    for step in range(start, start + steps):
        x = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x.roll(1, 1)).square().mean().backward()
        engine.mask_gradients()
        optimizer.step()
        engine.after_step()


def assert_zeros(model, optimizer, engine, gradients=False):
    for name, mask in engine.masks.items():
        weight = model.get_parameter(name)
        tensors = [weight.detach()]
        if not plugins.load("methods", engine.method).METHOD.straight_through:  # whose moments are of dense weights
            tensors += [v for v in optimizer.state[weight].values() if v.shape == weight.shape]
        for tensor in tensors + ([weight.grad] if gradients else []):
            assert (tensor[~mask] == 0).all(), name


def test_settings_are_read_without_torch():
    code = (
        "import sys; from raysparse import plugins\n"
        "for kind in ('methods', 'patterns'):\n"
        "    for name in plugins.names(kind): plugins.load(kind, name)\n"
        "for name in plugins.names('methods'): plugins.load('methods', name).Settings()\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("allocation", "sparsity", "prune_ratio"),
    [("erk", 0.0, 0.5), ("uniform", 0.1, 1.0), ("er", 0.5, 0.3), ("erk", 0.9, 0.5)],
)
def test_counts_never_drift_and_pruned_stays_zero(method, allocation, sparsity, prune_ratio):
    wanted = {"allocation": allocation, "sparsity": sparsity, "prune_ratio": prune_ratio, "update_interval": 1}
    model, optimizer, engine = build(method, **settings_of(method, **wanted))
    first = {name: int(mask.sum()) for name, mask in engine.masks.items()}
    total = sum(mask.numel() for mask in engine.masks.values())
    if engine.masks and engine.pattern == "element":
        assert sum(first.values()) == round((1 - sparsity) * total)
        assert engine.sparsity == pytest.approx(1 - sum(first.values()) / total, abs=1e-12)
    for step in range(8):
        train(model, optimizer, engine, 1, start=step)
        assert {name: int(mask.sum()) for name, mask in engine.masks.items()} == first
        assert_zeros(model, optimizer, engine)
    expected = {name: count / engine.masks[name].numel() for name, count in first.items()}
    assert engine.layer_density() == expected


@pytest.mark.parametrize(("method", "pattern"), TOGETHER)
@pytest.mark.parametrize(("sparsity", "prune_ratio"), [(0.5, 1.0), (0.75, 0.3)])
def test_whole_units_are_pruned_and_grown(method, pattern, sparsity, prune_ratio):
    wanted = {"pattern": pattern, "sparsity": sparsity, "prune_ratio": prune_ratio, "update_interval": 1, **SMALL}
    model, optimizer, engine = build(method, **settings_of(method, **wanted))
    first = {name: int(mask.sum()) for name, mask in engine.masks.items()}
    assert first == engine.layout.counts
    for step in range(6):
        train(model, optimizer, engine, 1, start=step)
        assert_zeros(model, optimizer, engine)
        for name, mask in engine.masks.items():
            assert int(mask.sum()) == first[name]
            assert mask.all() or engine.layout.patterns[name].valid(mask), name
    kind = plugins.load("methods", method).METHOD
    assert (engine.replaced > 0) == (kind.dynamic or kind.straight_through)
    if engine.masks and pattern != "nm":  # the convolution is masked by element and settles the sum
        assert sum(first.values()) == round((1 - sparsity) * sum(mask.numel() for mask in engine.masks.values()))


@pytest.mark.parametrize("method", METHODS)
def test_norms_and_biases_are_dense(method):
    model, _, engine = build(method, **settings_of(method, sparsity=0.9))
    assert all(model.get_parameter(name).ndim >= 2 and "norm" not in name for name in engine.masks)
    has = plugins.load("methods", method).Settings.model_fields
    assert len(engine.masks) == (10 if "sparsity" in has else 0)


@pytest.mark.parametrize(("method", "pattern"), TOGETHER)
def test_it_resumes_bit_for_bit_from_safe_state(method, pattern):
    wanted = {"pattern": pattern, "sparsity": 0.75, "update_interval": 3, "prune_ratio": 0.4, **SMALL}
    wanted = settings_of(method, **wanted)
    model, optimizer, engine = build(method, **wanted)
    train(model, optimizer, engine, 4)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict(), engine.state_dict()), file)
    train(model, optimizer, engine, 5, start=4)

    file.seek(0)
    weights, moments, state = torch.load(file, weights_only=True)
    again, optimizer_again, engine_again = build(method, **wanted)
    again.load_state_dict(weights)
    optimizer_again.load_state_dict(moments)
    engine_again.load_state_dict(state)
    train(again, optimizer_again, engine_again, 5, start=4)

    for name, weight in model.named_parameters():
        assert torch.equal(weight, again.get_parameter(name))
    for name, mask in engine.masks.items():
        assert torch.equal(mask, engine_again.masks[name])
    assert (engine.step, engine.updates, engine.replaced) == (
        engine_again.step,
        engine_again.updates,
        engine_again.replaced,
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_deep_copy_trains_alone_and_the_same(method):
    trio = build(method, **settings_of(method, sparsity=0.7, update_interval=2))
    train(*trio, 3)
    copied = copy.deepcopy(trio)
    before = {name: mask.clone() for name, mask in trio[2].masks.items()}
    train(*copied, 3, start=3)
    assert all(torch.equal(mask, trio[2].masks[name]) for name, mask in before.items())
    assert_zeros(*copied)
    train(*trio, 3, start=3)
    for name, weight in trio[0].named_parameters():
        assert torch.equal(weight, copied[0].get_parameter(name))


@pytest.mark.parametrize("method", METHODS)
def test_masks_depend_on_the_seed_alone(method):
    wanted = settings_of(method, sparsity=0.8)
    torch.manual_seed(5)
    one, two, other = (build(method, seed=seed, **wanted)[2].masks for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    if one and not plugins.load("methods", method).METHOD.straight_through:  # whose masks follow the weights
        assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", METHODS)
def test_the_global_generator_is_not_touched(method):
    trio = build(method, **settings_of(method, sparsity=0.8, update_interval=1))
    torch.manual_seed(3)
    SparseEngine(trio[0], trio[1], method=method, **settings_of(method, sparsity=0.9))
    train(*trio, 2)
    got = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(got, torch.rand(3))
