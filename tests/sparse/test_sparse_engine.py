"""The engine's contract, on hand-made layers and on a training loop."""

from __future__ import annotations

import copy

import pytest
import torch
from sparse_training import backward, batch, net, state_of, train
from torch import nn

from raysparse.errors import UsageError
from raysparse.sparse import SparseEngine, criteria, masks
from raysparse.sparse import engine as engine_module


def one_layer(optimizer=torch.optim.AdamW, **settings):
    """A 2 x 4 linear layer with settable weights, density .5."""
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    optimizer = optimizer(model.parameters(), lr=1e-3)
    settings = {"method": "rigl", "sparsity": 0.5, "prune_ratio": 0.5, "update_interval": 1} | settings
    return model[0].weight, optimizer, SparseEngine(model, optimizer, **settings)


def load(engine, weight, mask, values):
    state = engine.state_dict()
    state["masks"]["0.weight"] = torch.tensor(mask, dtype=torch.bool)
    with torch.no_grad():
        weight.copy_(torch.tensor(values))
    engine.load_state_dict(state)


def test_one_rigl_update_drawn_by_hand():
    weight, optimizer, engine = one_layer(torch.optim.SGD)
    load(engine, weight, [[1, 1, 0, 0], [0, 1, 1, 0]], [[5.0, -0.1, 9.0, 9.0], [9.0, 0.2, -3.0, 9.0]])
    assert weight.tolist() == [[5.0, pytest.approx(-0.1), 0, 0], [0, pytest.approx(0.2), -3.0, 0]]
    # 2 of 4 are pruned: -.1 and .2; the largest gradients among the inactive are -7 and 6; 8 is on a kept weight
    weight.grad = torch.tensor([[8.0, 0.5, 1.0, -7.0], [6.0, 2.0, 0.0, 3.0]])
    engine.mask_gradients()
    assert weight.grad.tolist() == [[8.0, 0.5, 0, 0], [0, 2.0, 0, 0]]
    weight.grad.zero_()  # so that the step leaves the numbers above
    optimizer.step()
    engine.after_step()
    assert engine.masks["0.weight"].int().tolist() == [[1, 0, 0, 1], [1, 0, 1, 0]]
    assert weight.tolist() == [[5.0, 0, 0, 0], [0, 0, -3.0, 0]]
    assert (engine.step, engine.updates, engine.replaced) == (1, 1, 2)


def test_a_connection_pruned_and_grown_at_once_was_never_away():
    weight, optimizer, engine = one_layer()
    load(engine, weight, [[1, 1, 0, 0], [0, 1, 1, 0]], [[5.0, -0.1, 0, 0], [0, 0.2, -3.0, 0]])
    weight.grad = torch.tensor([[0.0, 9.0, 1.0, -7.0], [0.0, 2.0, 0.0, 3.0]])  # 9 at the pruned -.1
    engine.mask_gradients()
    optimizer.step()
    kept = weight[0, 1].item()
    engine.after_step()
    assert engine.masks["0.weight"].int().tolist() == [[1, 1, 0, 1], [0, 0, 1, 0]]
    assert kept != 0
    assert weight[0, 1].item() == kept
    assert engine.replaced == 1


def test_magran_grows_at_random_among_the_inactive():
    grown = torch.zeros(2, 4)
    for seed in range(500):
        weight, optimizer, engine = one_layer(torch.optim.SGD, method="magran", seed=seed, prune_ratio=0.25)
        load(engine, weight, [[1, 1, 0, 0], [0, 1, 1, 0]], [[5.0, 0.1, 0, 0], [0, 2.0, 3.0, 0]])
        weight.grad = torch.zeros(2, 4)
        engine.mask_gradients()
        optimizer.step()
        engine.after_step()
        grown += engine.masks["0.weight"]
    survivors = [[500, 0, 0, 0], [0, 500, 500, 0]]
    chances = (grown - torch.tensor(survivors)).flatten()[[1, 2, 3, 4, 7]]
    assert chances.sum() == 500
    assert ((chances > 60) & (chances < 140)).all()  # 100 expected each, standard deviation 8.9


class Stop(BaseException):
    """As KeyboardInterrupt, which pytest takes for its own."""


@pytest.mark.parametrize("error", [RuntimeError, Stop])
@pytest.mark.parametrize("place", ["score", "zero", "bits"])
@pytest.mark.parametrize("on_host", [True, False])  # False: as on a GPU
def test_an_update_stopped_half_way_leaves_the_old_masks_and_weights(monkeypatch, place, error, on_host):
    monkeypatch.setattr(masks, "on_host", lambda _: on_host)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True)
    engine = SparseEngine(model, optimizer, sparsity=0.5, update_interval=3, prune_ratio=0.5)
    train(model, optimizer, engine, 2)
    backward(model, optimizer, 2)
    engine.mask_gradients()
    optimizer.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"], engine.state_dict()))
    calls = 0

    def second_time_stops(function):
        def wrapped(*arguments):
            nonlocal calls
            calls += 1
            if calls == 2:
                raise error("stopped")
            return function(*arguments)

        return wrapped

    with monkeypatch.context() as patch:
        if place == "score":
            patch.setitem(criteria.CRITERIA, "gradient", second_time_stops(criteria.gradient))
        elif place == "zero":
            patch.setattr(engine_module.Undo, "zero", second_time_stops(engine_module.Undo.zero))
        else:
            patch.setattr(engine_module, "all_bits", second_time_stops(engine_module.all_bits))
        with pytest.raises(error, match="stopped"):
            engine.after_step()
    assert calls == 2
    weights, moments, state = before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    for index, entries in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, moments[index][key]) for key, value in entries.items())
    now = engine.state_dict()
    assert all(torch.equal(mask, state["masks"][name]) for name, mask in now.pop("masks").items())
    assert now == {key: state[key] for key in now}
    train(model, optimizer, engine, 3)
    assert engine.updates > 0  # and it goes on


def test_updates_stop_at_the_end_and_the_cosine_falls():
    counts = []
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-1)
    engine = SparseEngine(
        model, optimizer, method="magran", sparsity=0.5, prune_schedule="cosine", update_end_step=8, update_interval=2
    )
    for _ in range(6):
        train(model, optimizer, engine, 2)
        counts.append(engine.replaced)
    assert engine.updates == 3  # after steps 2, 4 and 6, not at 8
    assert counts[2] == counts[5]
    gains = [counts[0], counts[1] - counts[0], counts[2] - counts[1]]
    assert gains[0] > gains[1] > gains[2] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    model = net().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    engine = SparseEngine(model, optimizer, sparsity=0.75, update_interval=2)
    for step in range(5):
        x, y = (t.to(dtype) for t in batch(step))
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        engine.mask_gradients()
        optimizer.step()
        engine.after_step()
    assert engine.replaced > 0
    assert all((model.get_parameter(n)[~m] == 0).all() for n, m in engine.masks.items())


def test_channels_last_weights_give_the_same_masks_and_keep_their_format():
    got = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = (
            nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).double().to(memory_format=memory_format)
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine = SparseEngine(model, optimizer, sparsity=0.8, update_interval=2)
        for step in range(6):
            x = torch.randn(2, 4, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            engine.mask_gradients()
            optimizer.step()
            engine.after_step()
        got.append(engine.masks)
        assert model[0].weight.is_contiguous(memory_format=memory_format)
        assert all((model.get_parameter(n)[~m] == 0).all() for n, m in engine.masks.items())
    assert all(torch.equal(got[0][name], got[1][name]) for name in got[0])


def test_deterministic_algorithms_are_enough():
    torch.use_deterministic_algorithms(True)
    try:
        model = nn.Sequential(nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last), nn.Flatten(), nn.Linear(8, 2))
        optimizer = torch.optim.AdamW(model.parameters())
        engine = SparseEngine(model, optimizer, sparsity=0.5, update_interval=1)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(2, 4, 3, 3)).square().mean().backward()
            engine.mask_gradients()
            optimizer.step()
            engine.after_step()
        assert engine.replaced > 0
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_layer_without_gradient_is_left_as_it_is():
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "unused": nn.Linear(8, 8)})
    optimizer = torch.optim.AdamW(model.parameters())
    engine = SparseEngine(model, optimizer, sparsity=0.5, update_interval=1)
    before = engine.masks
    model["used"](torch.randn(4, 8)).square().mean().backward()
    engine.mask_gradients()
    optimizer.step()
    engine.after_step()
    assert torch.equal(before["unused.weight"], engine.masks["unused.weight"])
    assert not torch.equal(before["used.weight"], engine.masks["used.weight"])


def test_moments_from_before_the_engine_are_masked_too():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    backward(model, optimizer, 0)
    optimizer.step()
    engine = SparseEngine(model, optimizer, sparsity=0.8)
    for name, mask in engine.masks.items():
        weight = model.get_parameter(name)
        assert len(state_of(optimizer, weight)) == 2
        assert all((t[~mask] == 0).all() and (t[mask] != 0).any() for t in (weight, *state_of(optimizer, weight)))


def test_an_ema_shadow_is_masked_in_place():
    model = net()
    engine = SparseEngine(model, torch.optim.AdamW(model.parameters()), sparsity=0.8)
    shadow = {name: torch.ones_like(weight) for name, weight in model.named_parameters()}
    pointers = {name: tensor.data_ptr() for name, tensor in shadow.items()}
    engine.apply_to(shadow)
    for name, tensor in shadow.items():
        assert torch.equal(tensor, engine.masks[name].float() if name in engine.masks else torch.ones_like(tensor))
        assert tensor.data_ptr() == pointers[name]
    with pytest.raises(UsageError, match=r"no tensor.*'0\.weight'"):
        engine.apply_to({"3.weight": shadow["3.weight"]})
    with pytest.raises(UsageError, match="has shape"):
        engine.apply_to(shadow | {"0.weight": torch.ones(2, 2)})


def test_a_model_declares_groups_and_dense_layers():
    model = nn.ModuleDict({x: nn.Linear(8, 8) for x in "qkvo"})
    model.allocation_groups = [["q.weight", "k.weight", "v.weight"]]
    model.keep_dense = {"o"}
    engine = SparseEngine(model, torch.optim.AdamW(model.parameters()), sparsity=0.5)
    assert {name: int(mask.sum()) for name, mask in engine.masks.items()} == {f"{x}.weight": 32 for x in "qkv"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, r"\[0, 1\)"),
        ({"sparsity": -0.2}, r"\[0, 1\)"),
        ({"prune_ratio": 0.0}, r"\(0, 1\]"),
        ({"prune_ratio": 1.5}, r"\(0, 1\]"),
        ({"update_interval": 0}, "at least 1"),
        ({"update_end_step": 0}, "at least 1"),
        ({"method": "riggl"}, "did you mean 'rigl'"),
        ({"allocation": "er-k"}, "did you mean 'erk'"),
        ({"prune_schedule": "cosin"}, "did you mean 'cosine'"),
        ({"prune_schedule": "cosine"}, "update_end_step"),
        ({"method": "static", "prune_ratio": 0.5}, "'static' has no prune_ratio.*It has: allocation, .*sparsity"),
        ({"method": "static", "update_end_step": 5}, "no update_end_step"),
        ({"method": "dense", "sparsity": 0.5}, "'dense' has no sparsity"),
        ({"keep_dense": ["9"]}, "no module or parameter"),
        ({"keep_dense": ["0", "3"]}, "nothing to mask"),
        ({"sparsity": 0.995}, "each layer keeps"),
    ],
)
def test_bad_settings_are_refused_and_change_nothing(settings, message):
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match=message):
        SparseEngine(model, torch.optim.AdamW(model.parameters()), **settings)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_with_nothing_to_mask_and_another_models_optimizer_are_refused():
    norm = nn.LayerNorm(4)
    with pytest.raises(UsageError, match="nothing to mask"):
        SparseEngine(norm, torch.optim.AdamW(norm.parameters()))
    with pytest.raises(UsageError, match="none of the model's"):
        SparseEngine(net(), torch.optim.AdamW(net().parameters()))


def test_after_step_without_mask_gradients_is_refused():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    engine = SparseEngine(model, optimizer)
    backward(model, optimizer, 0)
    optimizer.step()
    with pytest.raises(UsageError, match="without mask_gradients"):
        engine.after_step()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("step"), "no 'step'"),
        (lambda s: s.update(method="magran"), "method 'magran', this engine 'rigl'"),
        (lambda s: s.update(seed=4), "seed 4"),
        (lambda s: s["masks"].pop("0.weight"), r"lacks masks of this model: 0\.weight"),
        (lambda s: s["masks"].update(x=torch.ones(2, 2).bool()), "does not: x"),
        (lambda s: s["masks"].update({"0.weight": torch.ones(2, 2).bool()}), r"'0\.weight' is torch.bool \(2, 2\)"),
        (lambda s: s["masks"].update({"0.weight": s["masks"]["0.weight"].float()}), "torch.float32"),
        (lambda s: s["masks"].update({"0.weight": torch.ones(16, 8).bool()}), "128 active weights"),
    ],
)
def test_a_state_of_something_else_is_refused_and_changes_nothing(change, message):
    model = net()
    engine = SparseEngine(model, torch.optim.AdamW(model.parameters()), sparsity=0.8)
    state = engine.state_dict()
    before = engine.state_dict()
    change(state)
    with pytest.raises(UsageError, match=message):
        engine.load_state_dict(state)
    after = engine.state_dict()
    assert all(torch.equal(mask, before["masks"][name]) for name, mask in after["masks"].items())


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("pattern", ["element", "block"])
@pytest.mark.parametrize("method", ["rigl", "set", "magran"])
def test_an_update_on_a_gpu_is_that_on_a_cpu_and_waits_for_nothing(method, pattern, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")

    drawn = criteria.Layer.drawn
    monkeypatch.setattr(criteria.Layer, "drawn", lambda layer, by: drawn(layer, torch.device("cuda")))
    ends = []
    for device in ("cpu", "cuda"):
        draw = torch.Generator().manual_seed(0)
        # Two of one shape are chosen for together, and of single weights counted in several rows.
        model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 128), torch.nn.Linear(128, 128))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=draw))
        model.to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
        engine = SparseEngine(
            model, optimizer, method=method, sparsity=0.5, update_interval=2, prune_ratio=0.3, pattern=pattern
        )
        for _ in range(4):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=draw).to(device)
            engine.mask_gradients()
            optimizer.step()
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            try:
                engine.after_step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert engine.updates == 2
        assert engine.replaced > 0
        ends.append((engine.replaced, {name: mask.cpu() for name, mask in engine.masks.items()}))
        for name, mask in engine.masks.items():
            assert not model.get_parameter(name)[~mask].any()
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(mask, ends[1][1][name]) for name, mask in ends[0][1].items())
