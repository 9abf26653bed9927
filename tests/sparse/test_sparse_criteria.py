"""SET, mixed and momentum growth: by hand, and at the settings where they are another method."""

from __future__ import annotations

import copy
from unittest import mock

import torch
from hypothesis import given
from hypothesis import strategies as st
from sparse_training import backward, net, train
from torch import nn

from raysparse.sparse import SparseEngine, masks
from raysparse.sparse.criteria import CRITERIA, Layer
from raysparse.sparse.gradients import window
from raysparse.sparse.masks import lowest
from raysparse.sparse.patterns import element
from raysparse.sparse.settings import Sparse


def pruned(weights, count, candidates=None):
    weight = torch.tensor(weights)
    among = torch.ones_like(weight, dtype=torch.bool) if candidates is None else candidates
    layer = Layer("x", weight, None, 0, 1, element.of(weight.shape, Sparse()), among, count)
    return weight[lowest(CRITERIA["sign_balanced"](layer), count, among)].tolist()


def test_set_prunes_the_smallest_positive_and_the_largest_negative():
    assert sorted(pruned([1.0, 2, 3, 4, -5, -6, -7, -8], 4)) == [-6, -5, 1, 2]
    assert sorted(pruned([1.0, 2, 3, 4, -5, -6, -7, -8], 8)) == [-8, -7, -6, -5, 1, 2, 3, 4]
    assert sorted(pruned([1.0, 2, 3, 4, 5, 6, -1, -2], 4)) == [-1, 1, 2, 3]  # three of four are positive
    assert sorted(pruned([0.0, 0, 5, -1, -2, -3], 2)) == [-1, 0]  # a grown weight that has not moved yet
    assert pruned([1.0, 2, 3], 1) == [1]
    assert pruned([-1.0, -2, -3], 2) == [-1, -2]
    assert pruned([1.0, -9, 2, -8], 2, torch.tensor([True, True, True, False])) == [1, -9]  # 4/3 of 2 rounded: one


def test_the_shares_of_both_signs_are_kept():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4000, generator=generator) + 0.7
    gone = torch.tensor(pruned(weight.tolist(), 1000))
    positive = int((weight >= 0).sum())
    assert int((gone >= 0).sum()) == round(1000 * positive / 4000)
    assert gone[gone >= 0].max() <= weight[weight >= 0].sort().values[int((gone >= 0).sum()) - 1]


@given(
    st.lists(st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0]) | st.floats(-9, 9), min_size=1, max_size=30), st.data()
)
def test_a_gpu_chooses_the_same_of_both_signs(weights, data):
    weight = torch.tensor(weights)
    among = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(weights), max_size=len(weights))))
    count = data.draw(st.integers(0, int(among.sum())))
    layer = Layer("x", weight, None, 0, 1, element.of(weight.shape, Sparse()), among, count)
    found = [CRITERIA["sign_balanced"](layer)]
    with mock.patch.object(masks, "on_host", return_value=False):
        found.append(CRITERIA["sign_balanced"](layer))
    assert found[0].tolist() == found[1].tolist()


def test_random_scores_are_drawn_on_a_gpu_itself():
    weight = torch.empty(6, 4, device="meta")
    layer = Layer("x", weight, None, 0, 1, element.of(weight.shape, Sparse()))
    with mock.patch.object(torch, "rand", side_effect=AssertionError):
        assert CRITERIA["random"](layer).device.type == "meta"


def trained(method, steps=12, **settings):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = SparseEngine(
        model, optimizer, method=method, sparsity=0.6, update_interval=3, prune_ratio=0.4, seed=2, **settings
    )
    train(model, optimizer, engine, steps)
    return engine.masks


def same(one, two):
    return all(torch.equal(mask, two[name]) for name, mask in one.items())


def test_mixed_growth_is_rigl_at_0_and_magran_at_1():
    rigl, magran = trained("rigl"), trained("magran")
    assert same(trained("mixed", random_share=0.0), rigl)
    assert same(trained("mixed", random_share=1.0), magran)
    half = trained("mixed", random_share=0.5)
    assert not same(half, rigl)
    assert not same(half, magran)


def test_a_share_of_the_grown_is_random():
    weight, gradient = torch.randn(100), torch.arange(100.0)
    candidates = torch.ones(100, dtype=torch.bool)

    class Settings:
        random_share = 0.25

    layer = Layer("x", weight, gradient, 0, 1, element.of((100,), Sparse()), candidates, 40, Settings)
    chosen = CRITERIA["mixed"](layer).topk(40).indices.sort().values.tolist()
    assert set(range(70, 100)) <= set(chosen)
    assert chosen[:10] != list(range(60, 70))


def test_momentum_0_is_rigl():
    assert same(trained("momentum", gradient_momentum=0.0), trained("rigl"))
    assert not same(trained("momentum", gradient_momentum=0.9), trained("rigl"))


def test_the_average_by_hand_leaves_out_skipped_steps_and_is_dropped_after_an_update():
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    weight, optimizer = model[0].weight, torch.optim.SGD(model.parameters(), lr=0.0)
    engine = SparseEngine(
        model, optimizer, method="momentum", sparsity=0.5, update_interval=4, prune_ratio=0.25, gradient_momentum=0.5
    )
    for value, skipped in ((8.0, False), (torch.inf, True), (4.0, False), (2.0, False)):
        weight.grad = torch.full((2, 4), value)
        engine.mask_gradients()
        engine.after_step(skipped=skipped)
    average = engine.state_dict()["gradients"]["0.weight"]
    assert (average == ((8 * 0.5) * 0.5 + 4 * 0.5) * 0.5 + 2 * 0.5).all()
    weight.grad = torch.zeros(2, 4)
    engine.mask_gradients()
    engine.after_step()
    assert engine.updates == 1
    assert engine.state_dict()["gradients"] == {}


def test_the_average_is_kept_only_before_an_update():
    assert window("momentum", 0.9) == 66
    assert (window("gradient", 0.9), window(None, 0.9), window("momentum", 0.0)) == (1, 0, 1)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = SparseEngine(model, optimizer, method="momentum", update_interval=20, gradient_momentum=0.1)
    held = []
    for step in range(20):
        backward(model, optimizer, step)
        engine.mask_gradients()
        optimizer.step()
        engine.after_step()
        held.append(bool(engine.state_dict()["gradients"]))
    assert held == [False] * 17 + [True] * 2 + [False]  # 3 steps: .1 ** 3


def test_a_resume_in_the_middle_of_the_average_is_exact():
    def build():
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, optimizer, SparseEngine(model, optimizer, method="momentum", sparsity=0.6, update_interval=5)

    trio, other = build(), build()
    train(*trio, 3)
    states = copy.deepcopy([part.state_dict() for part in trio])
    assert states[2]["gradients"]
    for part, state in zip(other, states, strict=True):
        part.load_state_dict(state)
    for _ in range(2):
        train(*trio, 4)
        train(*other, 4)
    assert trio[2].updates == 2
    assert same(trio[2].masks, other[2].masks)
    assert all(torch.equal(a, b) for a, b in zip(trio[0].parameters(), other[0].parameters(), strict=True))
