"""The sparse step predicts what ChiroDiff predicts and gives the gradients of its active weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raysparse import rng
from raysparse.diffusion.losses import eps_mse
from raysparse.errors import UsageError
from raysparse.models import _sparse_layout as layout
from raysparse.models import _sparse_training, chirodiff
from raysparse.models.chirodiff import ChiroDiff, Config, sparse_step

pytestmark = pytest.mark.usefixtures("compiler")


def masked_model(sparsity: float, hidden: int, layers: int, classes: int | None = None, seed: int = 0, **options: Any):
    """A model with biases far from 0, and random masks of all its GRU's weights, applied."""
    model = chirodiff.build(Config(hidden=hidden, layers=layers, num_classes=classes, **options), seed=0)
    draw = rng.generator(seed, "test masks")
    masks = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.5 * torch.randn(parameter.shape, generator=draw)
            elif name.startswith("gru."):
                masks[name] = torch.rand(parameter.shape, generator=draw) >= sparsity
                parameter *= 2 * masks[name]
    return model, masks


def batch_of(lengths: list[int], classes: int | None = None) -> dict[str, Tensor]:
    draw = rng.generator(1, "test input")
    given = {
        "x": torch.randn(len(lengths), max(lengths) + 1, 3, generator=draw),
        "timesteps": torch.randint(0, 1000, (len(lengths),), generator=draw),
        "lengths": torch.tensor(lengths),
    }
    if classes is not None:
        given["labels"] = torch.randint(0, classes, (len(lengths),), generator=draw)
    return given


def gradients(
    network: Callable[..., Tensor], model: ChiroDiff, given: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    eps = torch.randn(given["x"].shape, generator=rng.generator(2, "test eps"))
    loss = eps_mse(network(**given), eps, given["lengths"])
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(model: ChiroDiff, masks: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    want_loss, want = gradients(model, model, given)
    loss, got = gradients(sparse_step(model, masks), model, given)
    assert float(loss) == pytest.approx(float(want_loss), rel=1e-5)
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        dense = want[name]
        if name in masks:
            pruned = ~masks[name]
            if name.startswith("gru.weight_ih_l0"):
                pruned[:, 5:] = False  # of time and class: once per sketch, so dense at no cost
            assert not gradient[pruned].any(), name
            dense = dense.where(~pruned, 0)
        assert float((gradient - dense).norm()) <= 1e-5 * float(want[name].norm()) + 1e-7, name


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 25), min_size=1, max_size=70),
    st.integers(1, 16),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.3, 0.75, 0.9, 0.97, 1.0]),
    st.sampled_from([None, 1, 3]),
    st.sampled_from(["plain", "abs", "del"]),
)
def test_equals_the_model(
    lengths: list[int], hidden: int, layers: int, sparsity: float, classes: int | None, inputs: str
) -> None:
    assert_equal(*masked_model(sparsity, hidden, layers, classes, inputs=inputs), batch_of(lengths, classes))


def test_equals_the_model_at_the_papers_size() -> None:
    lengths = (88.6 + 17 * torch.randn(33, generator=rng.generator(3, "test lengths"))).long().clamp(20, 165)
    assert_equal(*masked_model(0.9, 96, 3), batch_of(lengths.tolist()))


def test_a_weight_that_is_active_and_0_gets_its_gradient() -> None:
    model, masks = masked_model(0.5, 8, 2)
    model.gru.weight_hh_l1.data.zero_()
    _, got = gradients(sparse_step(model, masks), model, batch_of([9, 4]))
    mask = masks["gru.weight_hh_l1"]
    assert torch.equal(got["gru.weight_hh_l1"] != 0, mask)


def test_new_masks_are_followed() -> None:
    model, masks = masked_model(0.5, 8, 2)
    step = sparse_step(model, masks)
    other, new = masked_model(0.8, 8, 2, seed=1)
    model.load_state_dict(other.state_dict())
    step.follow(new)
    given = batch_of([9, 4, 17])
    loss, got = gradients(step, model, given)
    want_loss, want = gradients(sparse_step(other, new), other, given)
    assert torch.equal(loss, want_loss)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_masks_whose_layout_was_interrupted_are_laid_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, masks = masked_model(0.9, 8, 2)
    step, whole = sparse_step(model, masks), layout.by_column
    model, masks = masked_model(0.5, 8, 2, seed=1)
    step._model[0].load_state_dict(model.state_dict())
    left = [1, 1, 1]  # of four

    def interrupted(*given: Any) -> layout.ByColumn:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return whole(*given)

    with monkeypatch.context() as patch:
        patch.setattr(layout, "by_column", interrupted)
        with pytest.raises(KeyboardInterrupt):
            step.follow(masks)
    step.follow(masks)
    given = batch_of([5, 3])
    assert torch.allclose(step(**given), model(**given), rtol=0, atol=1e-5)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    model, masks = masked_model(0.8, 16, 2)
    given, step = batch_of([1 + 13 * place % 40 for place in range(100)]), sparse_step(model, masks)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5, 1):
            torch.set_num_threads(count)
            found.append(gradients(step, model, given)[1])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in found[0])


def test_an_old_backward_pass_is_refused() -> None:
    model, masks = masked_model(0.5, 8, 1)
    step, given = sparse_step(model, masks), batch_of([3, 2])
    first = step(**given).sum()
    step(**given).sum().backward()
    with pytest.raises(RuntimeError, match="another forward pass, or other masks, came between"):
        first.backward()
    later = step(**given).sum()
    step.follow(masked_model(0.1, 8, 1, seed=1)[1])  # its backward pass ended the process
    with pytest.raises(RuntimeError, match="another forward pass, or other masks, came between"):
        later.backward()


def test_what_it_has_no_gradient_of_is_refused() -> None:
    model, masks = masked_model(0.5, 8, 1)
    given = batch_of([3, 2])
    with pytest.raises(ValueError, match="no gradient of x"):
        sparse_step(model, masks)(**given | {"x": given["x"].requires_grad_()})
    step = sparse_step(model, masks)
    with pytest.raises(UsageError, match="float64 on cpu"):
        sparse_step(model.double(), masks)
    with pytest.raises(UsageError, match="float64 on cpu"):  # cast after it was made
        step(**batch_of([3, 2]))


def test_nothing_finite_is_made_of_what_is_not() -> None:
    model, masks = masked_model(0.5, 8, 2)
    given = batch_of([5, 4])
    given["x"][0, 2, 1] = torch.nan
    loss, _ = gradients(sparse_step(model, masks), model, given)
    assert loss.isnan()


@pytest.mark.parametrize(
    ("hidden", "sparsity", "intel", "amd"),
    [
        (8, 0.0, True, True),
        (64, 0.0, True, True),
        (96, 0.0, False, True),
        (128, 0.0, False, False),
        (96, 0.25, True, True),
        (192, 0.25, False, False),
        (192, 0.4, False, True),
        (192, 0.5, True, True),
        (256, 0.5, False, True),
        (256, 0.75, True, True),
        (320, 0.5, False, False),
        (320, 0.75, True, True),
    ],
)
def test_where_it_pays(hidden: int, sparsity: float, intel: bool, amd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    step = sparse_step(*masked_model(sparsity, hidden, 2))
    for table, pays in ((_sparse_training._INTEL, intel), (_sparse_training._AMD, amd)):
        monkeypatch.setattr(_sparse_training, "_PAYS", table)
        assert step.pays_for(32) is step.pays_for(128) is pays


def test_with_few_sketches_it_pays_for_fewer_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sparse_training, "_PAYS", _sparse_training._AMD)
    monkeypatch.setattr(_sparse_training, "_MANY", 20)
    for sparsity, least in ((0.9, 3), (0.75, 6), (0.5, 12)):  # the rule takes a density of .85
        step = sparse_step(*masked_model(sparsity, 128, 2))
        found = [examples for examples in range(1, 20) if step.pays_for(examples)]
        assert found == list(range(least, 20))
