"""The engine in a training loop: every optimizer, schedulers, AMP, accumulation."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from sparse_training import backward, batch, net, state_of, train
from torch import nn

from raysparse.errors import UsageError
from raysparse.sparse import SparseEngine


def adamw(**options):
    return lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1, **options)


OPTIMIZERS = {
    "adamw": adamw(),
    "adamw foreach": adamw(foreach=True),
    "adamw loop": adamw(foreach=False),
    "adamw fused": adamw(fused=True),
    "adamw amsgrad": adamw(amsgrad=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-1),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "adamax, unknown": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "rprop, unknown": lambda p: torch.optim.Rprop(p, lr=1e-2),
}


@pytest.mark.parametrize("method", ["static", "magran", "rigl"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_keep_the_zeros(name, method):
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    dynamic = {} if method == "static" else {"update_interval": 3, "prune_ratio": 0.4}
    engine = SparseEngine(model, optimizer, method=method, sparsity=0.7, **dynamic)
    before = engine.masks

    def check(when):
        for layer, mask in engine.masks.items():
            weight = model.get_parameter(layer)
            assert (weight[~mask] == 0).all()
            assert when == "stepped" or (weight.grad[~mask] == 0).all()
            assert all((moment[~mask] == 0).all() for moment in state_of(optimizer, weight))
            if when == "stepped":
                grown = mask & ~before[layer]
                assert (weight[grown] == 0).all()
                assert all((moment[grown] == 0).all() for moment in state_of(optimizer, weight))
                before[layer] = mask

    train(model, optimizer, engine, 20, check)
    assert engine.updates == (0 if method == "static" else 6)
    assert method == "static" or engine.replaced > 0
    moved = [model.get_parameter(layer)[mask] for layer, mask in engine.masks.items()]
    assert all(torch.isfinite(w).all() and (w != 0).float().mean() > 0.5 for w in moved)


class Both(torch.optim.Optimizer):
    """Muon beside AdamW, as it is used: an optimizer of no known class."""

    def __init__(self, model):
        matrices = [p for p in model.parameters() if p.ndim == 2]
        super().__init__(matrices, {})
        self.muon = torch.optim.Muon(matrices, lr=1e-2)
        self.state = self.muon.state

    def step(self, closure=None):
        self.muon.step()


@pytest.mark.parametrize("make", [lambda m: torch.optim.Muon([p for p in m.parameters() if p.ndim == 2]), Both])
def test_muon_fills_zeros_and_the_engine_empties_them(make):
    model = net()
    optimizer = make(model)
    engine = SparseEngine(model, optimizer, sparsity=0.7, update_interval=4)
    backward(model, optimizer, 0)
    engine.mask_gradients()
    optimizer.step()
    assert any((model.get_parameter(n)[~m] != 0).any() for n, m in engine.masks.items())  # why it is not in KEEPS_ZEROS
    engine.after_step()
    train(model, optimizer, engine, 10)
    for name, mask in engine.masks.items():
        weight = model.get_parameter(name)
        assert (weight[~mask] == 0).all()
        assert all((moment[~mask] == 0).all() for moment in state_of(optimizer, weight))


def test_an_optimizer_that_takes_gradients_of_its_own_is_refused():
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(UsageError, match="LBFGS takes gradients of its own within a step, which are never masked"):
        SparseEngine(model, optimizer, sparsity=0.5)
    SparseEngine(model, optimizer, method="dense")


def test_tensors_are_changed_in_place():
    model = nn.GRU(4, 5, bidirectional=True)
    optimizer = torch.optim.AdamW(model.parameters())
    engine = SparseEngine(model, optimizer, sparsity=0.5, update_interval=2)
    addresses = None
    for _ in range(7):
        optimizer.zero_grad(set_to_none=False)
        model(torch.randn(3, 2, 4))[0].square().mean().backward()
        engine.mask_gradients()
        optimizer.step()
        engine.after_step()
        tensors = [t for w in model.parameters() for t in (w, w.grad, *state_of(optimizer, w))]
        now = [tensor.data_ptr() for tensor in tensors]
        assert addresses in (None, now)
        addresses = now
    assert engine.updates == 3


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_lr_scheduler_before_or_after(when):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = schedule(optimizer, lambda s: 0.9**s) if when == "before" else None
        engine = SparseEngine(model, optimizer, sparsity=0.7, update_interval=2)
        scheduler = scheduler or schedule(optimizer, lambda s: 0.9**s)
        for step in range(6):
            backward(model, optimizer, step)
            engine.mask_gradients()
            optimizer.step()
            engine.after_step()
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.9**6)
    assert engine.updates == 3


def test_a_step_skipped_by_a_grad_scaler_counts_for_nothing():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = SparseEngine(model, optimizer, sparsity=0.7, update_interval=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    skipped = []
    for step in range(6):
        x, y = batch(step)
        optimizer.zero_grad()
        scaler.scale((model(x) - y).square().mean()).backward()
        if step == 1:
            for weight in (model[0].weight, model[3].weight):
                weight.grad[0] = math.inf
                weight.grad[1] = math.nan
        before = copy.deepcopy((model.state_dict(), engine.state_dict()))
        scaler.unscale_(optimizer)
        engine.mask_gradients()
        assert (model[0].weight.grad[~engine.masks["0.weight"]] == 0).all()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped.append(scaler.get_scale() < scale)
        engine.after_step(skipped=skipped[-1])
        if skipped[-1]:
            assert engine.step == before[1]["step"] == 1
            assert all(torch.equal(v, before[0][k]) for k, v in model.state_dict().items())
            assert all(torch.equal(m, before[1]["masks"][n]) for n, m in engine.masks.items())
    assert skipped == [False, True, False, False, False, False]
    assert (engine.step, engine.updates) == (5, 2)
    for name, mask in engine.masks.items():
        assert torch.isfinite(model.get_parameter(name)).all()
        assert (model.get_parameter(name)[~mask] == 0).all()


def test_accumulated_micro_batches_grow_what_the_big_batch_grows():
    masks = []
    for parts in (1, 4):
        model = net().double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine = SparseEngine(model, optimizer, sparsity=0.8, prune_ratio=0.3, update_interval=1)
        for step in range(4):
            x, y = (t.double() for t in batch(step, 16))
            optimizer.zero_grad()
            for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                ((model(a) - b).square().mean() / parts).backward()
            engine.mask_gradients()
            optimizer.step()
            engine.after_step()
        masks.append(engine.masks)
    assert engine.replaced > 0
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
