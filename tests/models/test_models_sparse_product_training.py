"""Linear layers that train by their active weights have the gradients of the layers they stand for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from raysparse import plugins
from raysparse.errors import UsageError
from raysparse.models import _cpu, _sparse_product_training, _sparse_products, uvit
from raysparse.models._sparse_product_training import SparseStep

pytestmark = pytest.mark.usefixtures("compiler")
COSTS = _sparse_product_training._COSTS  # outside of these tests


@pytest.fixture(scope="module", autouse=True)
def small_layers_too() -> Iterator[None]:
    """Layers of tests are so small that PyTorch would be faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_sparse_products, "_SMALL", 0)
        patch.setattr(_sparse_product_training, "_COSTS", _sparse_products.Costs(0, 0, 0))
        yield


class OneLayer(nn.Module):
    """Masked: bool [outputs, inputs], or [outputs, channels, height, width] of a convolution."""

    def __init__(self, mask: Tensor, bias: bool = True, padding: tuple[int, int] = (0, 0)) -> None:
        super().__init__()
        outputs, inputs, *kernel = mask.shape
        self.layer = (
            nn.Conv2d(inputs, outputs, (kernel[0], kernel[1]), padding=padding, bias=bias)
            if kernel
            else nn.Linear(inputs, outputs, bias=bias)
        )
        with torch.no_grad():
            self.layer.weight *= mask

    def forward(self, x: Tensor, timesteps: Tensor | None = None) -> Tensor:
        found: Tensor = self.layer(x)
        return found


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(network: nn.Module, model: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dx, and those of the model's parameters."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = network(x, None)
    y.backward(dy)
    found = [y.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]
    return [tensor for tensor in found if tensor is not None]


@settings(max_examples=60)
@given(
    sizes=st.tuples(st.integers(1, 600), st.integers(1, 70), st.integers(24, 500)),
    density=st.floats(0, 1),
    edges=st.sampled_from([(1, 1), (4, 1), (1, 4), (8, 8)]),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_gradients_are_those_of_the_layer(
    sizes: tuple[int, int, int], density: float, edges: tuple[int, int], bias: bool, seed: int
) -> None:
    """edges: of blocks of weights."""
    inputs, outputs, tokens = -(-sizes[0] // edges[1]) * edges[1], -(-sizes[1] // edges[0]) * edges[0], sizes[2]
    units = torch.rand(outputs // edges[0], inputs // edges[1], generator=torch.Generator().manual_seed(seed)) < density
    mask = units.repeat_interleave(edges[0], 0).repeat_interleave(edges[1], 1)
    model = OneLayer(mask, bias)
    step = SparseStep(model, {"layer.weight": mask})
    x, dy = drawn(2, tokens, inputs, seed=seed), drawn(2, tokens, outputs, seed=seed + 1)
    want, got = gradients(model, model, x, dy), gradients(step, model, x, dy)
    want[2] *= mask
    assert not got[2][~mask].any()
    for one, other in zip(got, want, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


@settings(max_examples=60)
@given(
    channels=st.tuples(st.integers(1, 40), st.integers(1, 30)),
    size=st.tuples(st.integers(5, 24), st.integers(5, 24)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    density=st.floats(0, 1),
    images=st.integers(1, 3),
    same=st.sampled_from([1, 4]),
    seed=st.integers(0, 2**31),
)
def test_gradients_are_those_of_the_convolution(
    channels: tuple[int, int],
    size: tuple[int, int],
    kernel: tuple[int, int],
    padding: tuple[int, int],
    density: float,
    images: int,
    same: int,
    seed: int,
) -> None:
    """same: outputs under the same mask."""
    inputs, outputs = channels
    mask = torch.rand(outputs, inputs, *kernel, generator=torch.Generator().manual_seed(seed)) < density
    mask = mask.repeat_interleave(same, 0)
    model = OneLayer(mask, padding=padding)
    step = SparseStep(model, {"layer.weight": mask})
    x = drawn(images, inputs, *size, seed=seed)
    dy = drawn(*model(x).shape, seed=seed + 1)
    want, got = gradients(model, model, x, dy), gradients(step, model, x, dy)
    want[2] *= mask
    assert not got[2][~mask].any()
    for one, other in zip(got, want, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["ddpm_unet", "latent_unet"])
def test_unets_have_the_gradients_of_all_their_parameters(name: str) -> None:
    module = plugins.load("models", name)
    model = module.build(module.Config(**module.SMALL), seed=0)
    masks = {}
    for weight_name, weight in model.named_parameters():
        if weight.dim() > 1:
            masks[weight_name] = torch.rand(weight.shape, generator=torch.Generator().manual_seed(len(masks))) < 0.4
            weight.data = (drawn(*weight.shape, seed=1) / weight[0].numel() ** 0.5) * masks[weight_name]
    check_step(model, masks, module.example(model.config, batch=6, points=1))


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads: int) -> None:
    mask = torch.rand(40, 30, generator=torch.Generator().manual_seed(0)) < 0.3
    model = OneLayer(mask)
    step, x, dy = SparseStep(model, {"layer.weight": mask}), drawn(5, 999, 30), drawn(5, 999, 40)
    before, want = torch.get_num_threads(), gradients(step, model, x, dy)
    torch.set_num_threads(threads)
    try:
        got = gradients(step, model, x, dy)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(got[:3], want[:3], strict=True))


def test_it_follows_masks_and_weights() -> None:
    masks = [torch.rand(20, 30, generator=torch.Generator().manual_seed(seed)) < 0.3 for seed in (0, 1)]
    model = OneLayer(masks[0])
    step, x, dy = SparseStep(model, {"layer.weight": masks[0]}), drawn(40, 30), drawn(40, 20)
    with torch.no_grad():
        model.layer.weight.copy_(drawn(20, 30, seed=3) * masks[1])
    step.follow({"layer.weight": masks[1]})
    for one, other in zip(gradients(step, model, x, dy)[:2], gradients(model, model, x, dy)[:2], strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_uvit_has_the_gradients_of_all_its_parameters() -> None:
    model = uvit.build(uvit.Config(**uvit.SMALL), seed=0)
    masks = {}
    for name, weight in model.named_parameters():
        if name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")):
            masks[name] = torch.rand(weight.shape, generator=torch.Generator().manual_seed(len(masks))) < 0.4
            weight.data *= masks[name]
    check_step(model, masks, uvit.example(model.config, batch=6, points=1))


def check_step(model: nn.Module, masks: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    step = SparseStep(model, masks)
    assert step.pays_for(1)
    given["x"] = drawn(*given["x"].shape)
    found = []
    for network in (model, step):
        model.zero_grad()
        network(**given).square().sum().backward()
        found.append(
            {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        )
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        mask = masks.get(name, 1)  # outside it a layer of few columns, which is PyTorch's, has gradients too
        # 1e-6: the key's bias, which a softmax takes no note of, has a gradient of rounding alone.
        assert float(((found[1][name] - gradient) * mask).norm()) <= 1e-5 * float((gradient * mask).norm()) + 1e-6, name


def test_layers_that_are_not_worth_it_stay_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sparse_product_training, "_COSTS", COSTS)
    full = torch.ones(64, 64, dtype=torch.bool)
    full[0, 0] = False
    for mask in (full, torch.ones_like(full)):  # single weights, and tiles
        assert not SparseStep(OneLayer(mask), {"layer.weight": mask}).pays_for(1)


def test_against_products_in_bfloat16_fewer_weights_must_be_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cpu, "PAIRS", False)
    monkeypatch.setattr(_sparse_product_training, "_COSTS", _sparse_products.Costs(1.5, 0, 0))
    monkeypatch.setattr(_cpu, "BFLOAT16", 2.0)
    for density, pays in ((0.5, False), (0.1, True)):
        mask = torch.rand(512, 512, generator=torch.Generator().manual_seed(0)) < density
        model, masks = OneLayer(mask), {"layer.weight": mask}
        with torch.autocast("cpu", torch.bfloat16):
            step = SparseStep(model, masks)
        step.follow({"layer.weight": mask.clone()})  # at an update autocast is off, as it is between two steps
        assert step.pays_for(1) == pays
        assert SparseStep(model, masks).pays_for(1)


def test_other_types_are_refused() -> None:
    mask = torch.ones(4, 4, dtype=torch.bool)
    with pytest.raises(UsageError, match="the model is bfloat16 on cpu"):
        SparseStep(OneLayer(mask).bfloat16(), {"layer.weight": mask})


def test_a_model_that_is_cast_afterwards_has_the_same_gradients() -> None:
    """The kernel would read its weights as other numbers."""
    mask = torch.rand(20, 30, generator=torch.Generator().manual_seed(0)) < 0.3
    model, x, dy = OneLayer(mask), drawn(40, 30), drawn(40, 20)
    step = SparseStep(model, {"layer.weight": mask})
    want = gradients(step, model, x, dy)
    got = gradients(step, model.double(), x, dy)
    assert [tensor.dtype for tensor in got[2:]] == [torch.float64] * 2
    assert all(torch.equal(one.float(), other) for one, other in zip(got, want, strict=True))
