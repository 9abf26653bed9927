"""nm_ste against its formula written out with autograd, and where it could lose a bit or a group."""

from __future__ import annotations

import copy

import pytest
import torch
from sparse_training import backward, batch, net
from torch import nn

from raysparse.errors import UsageError
from raysparse.sparse import SparseEngine


def build(seed=0, method="nm_ste", optimizer=torch.optim.AdamW, **settings):
    model = net(seed)
    optimizer = optimizer(model.parameters(), lr=1e-2)
    return model, optimizer, SparseEngine(model, optimizer, method=method, sparsity=0.5, **settings)


def train(model, optimizer, engine, steps, start=0, shadow=None):
    for step in range(start, start + steps):
        backward(model, optimizer, step)
        engine.mask_gradients()
        optimizer.step()
        if shadow is not None:
            weights = [model.get_parameter(name) for name in shadow]
            engine.average(shadow, lambda: torch._foreach_lerp_(list(shadow.values()), weights, 0.1))  # noqa: B023
        engine.after_step()
        if shadow is not None:
            engine.after_average(shadow)


def mask_of(weight, n=2, m=4):
    groups = weight.detach().abs().reshape(-1, m)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(n).indices, True)
    return mask.reshape(weight.shape)


@pytest.mark.parametrize(("ste", "strength"), [("sr", 0.3), ("plain", 0.0)])
def test_it_is_the_published_update(ste, strength):
    """Dense weights w, forward with w~ = m w, dL/dw = dL/dw~ + λ (1 - m) w; masks of the w before each step."""
    settings = {"sr_lambda": strength} if ste == "sr" else {}
    model, optimizer, engine = build(optimizer=torch.optim.SGD, ste=ste, **settings)
    reference = net()
    plain = torch.optim.SGD(reference.parameters(), lr=1e-2)
    layers = [reference[0], reference[3]]
    for step in range(30):
        dense = [layer.weight.detach().clone() for layer in layers]
        masks = [mask_of(weight) for weight in dense]
        for layer, mask in zip(layers, masks, strict=True):
            layer.weight.data.mul_(mask)
        assert torch.equal(model[0].weight, reference[0].weight), step
        backward(reference, plain, step)
        for layer, weight, mask in zip(layers, dense, masks, strict=True):
            layer.weight.data.copy_(weight)
            layer.weight.grad.add_(strength * (~mask * weight))
        plain.step()
        train(model, optimizer, engine, 1, start=step)
    assert engine.updates == 30
    assert engine.replaced > 0
    for index, layer in ((0, layers[0]), (3, layers[1])):
        mask = mask_of(layer.weight)
        assert torch.equal(engine.masks[f"{index}.weight"], mask)
        assert torch.allclose(model[index].weight, layer.weight * mask, atol=1e-7)


def test_every_group_is_exact_in_weights_and_average_after_every_step():
    trio = build()
    shadow = {name: p.detach().clone() for name, p in trio[0].named_parameters()}
    for step in range(40):
        train(*trio, 1, start=step, shadow=shadow)
        for name, mask in trio[2].masks.items():
            assert (mask.reshape(-1, 4).sum(1) == 2).all()
            for tensor in (trio[0].get_parameter(name), shadow[name]):
                assert (tensor.detach().reshape(-1, 4).count_nonzero(1) <= 2).all()
                assert (tensor[~mask] == 0).all()


def test_the_average_is_of_the_dense_weights():
    """A weight that is masked for a while comes back into the average with its past, not from 0."""
    trio, twin = build(), build()
    shadow = {name: p.detach().clone() for name, p in trio[0].named_parameters()}
    train(*trio, 25, shadow=shadow)
    name, dense = "0.weight", None
    for step in range(25):
        backward(twin[0], twin[1], step)
        twin[2].mask_gradients()
        if dense is None:
            dense = twin[0].get_parameter(name).detach().clone()
        twin[1].step()
        dense.lerp_(twin[0].get_parameter(name).detach(), 0.1)
        twin[2].after_step()
    assert torch.equal(shadow[name], dense * trio[2].masks[name])


def test_masks_change_only_every_k_steps_and_hidden_weights_move_all_the_time():
    trio = build(refresh_interval=5)
    before = trio[2].masks
    train(*trio, 4)
    assert all(torch.equal(mask, before[name]) for name, mask in trio[2].masks.items())
    assert trio[2].updates == 0
    train(*trio, 1, start=4)
    assert trio[2].updates == 1


def test_stages_end_in_the_pattern():
    trio = build(stages="3:4,6:8", stage_steps=4, refresh_interval=100)
    seen = []
    for step in range(12):
        seen.append((trio[2].layer_density()["0.weight"], trio[2].sparsity))
        train(*trio, 1, start=step)
    assert seen == [(0.75, 0.25)] * 8 + [(0.5, 0.5)] * 4
    assert (trio[2].masks["0.weight"].reshape(-1, 4).sum(1) == 2).all()
    wide = build(stages="progressive", stage_steps=1)[2]  # 8 and 16 inputs: 32 and 16 do not divide them all
    assert wide.layer_density() == {"0.weight": 1.0, "3.weight": 1.0}


def test_a_skipped_step_changes_nothing():
    trio = build(sr_lambda=0.5)
    train(*trio, 3)
    before = copy.deepcopy((trio[0].state_dict(), trio[2].state_dict()))
    backward(trio[0], trio[1], 3)
    trio[2].mask_gradients()
    trio[2].after_step(skipped=True)
    assert all(torch.equal(value, before[0][name]) for name, value in trio[0].state_dict().items())
    hidden, saved = trio[2].state_dict()["hidden"]["weights"], before[1]["hidden"]["weights"]
    assert all(torch.equal(value, saved[name]) for name, value in hidden.items())
    assert trio[2].step == 3


def test_nothing_of_the_dense_weights_is_lost():
    model = net()
    dense = copy.deepcopy(model.state_dict())
    engine = SparseEngine(model, torch.optim.AdamW(model.parameters()), method="nm_ste", sparsity=0.5)
    assert (model[0].weight.reshape(-1, 4).count_nonzero(1) == 2).all()
    engine.mask_gradients()  # without gradients
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("wrap", ["compile", "accumulate"])
def test_a_compiled_model_and_several_backward_passes(wrap):
    model, optimizer, engine = build(seed=1)
    other, second, twin = build(seed=1)
    network = torch.compile(other, backend="eager") if wrap == "compile" else other
    for step in range(6):
        train(model, optimizer, engine, 1, start=step)
        x, y = batch(step)
        second.zero_grad()
        for half in (slice(0, 4), slice(4, 8)) if wrap == "accumulate" else (slice(0, 8),):
            ((network(x[half]) - y[half]).square().mean() * len(x[half]) / 8).backward()
        twin.mask_gradients()
        second.step()
        twin.after_step()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(mask, twin.masks[name]) for name, mask in engine.masks.items())


def test_channels_last_convolutions():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
    other = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    engines = [
        SparseEngine(model, torch.optim.AdamW(model.parameters()), method="nm_ste", sparsity=0.75)
        for model in (plain, other)
    ]
    for name, mask in engines[0].masks.items():
        assert torch.equal(mask, engines[1].masks[name])
        assert (mask.movedim(1, -1).reshape(-1, 4).sum(1) == 1).all()
        assert torch.equal(plain.get_parameter(name), other.get_parameter(name))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "block"}, "pattern: got 'block'"),
        ({"sparsity": 0.6}, "leaves 1.6 of 4"),
        ({"stages": "4:3"}, "4:3 must leave"),
        ({"stages": "1:4,3:4"}, "no more than what precedes"),
        ({"stages": 184}, "in quotes"),
        ({"stages": "soon"}, "give fixed, progressive"),
        ({"start": "teacher"}, "need a teacher"),
        ({"loss": "both"}, "need a teacher"),
        ({"update_interval": 5}, "'nm_ste' has no update_interval"),
        ({"update_end_step": 5}, "no update_end_step"),
        ({"m": 5, "sparsity": 0.8}, "fits no layer"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    model = net()
    with pytest.raises(UsageError, match=message):
        SparseEngine(model, torch.optim.AdamW(model.parameters()), **{"method": "nm_ste", "sparsity": 0.5, **settings})


def test_a_state_of_another_model_is_refused():
    trio = build()
    state = trio[2].state_dict()
    state["hidden"]["weights"] = {"x": torch.zeros(2)}
    with pytest.raises(UsageError, match="belong to another model"):
        trio[2].load_state_dict(state)
