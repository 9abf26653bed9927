"""Products in bfloat16 by pairs: those of rounded numbers, in sampling and in training."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from raysparse import config, native
from raysparse.models import _cpu, _sparse_product_training, _sparse_products, uvit
from raysparse.models import _sparse_pairs as pairs
from raysparse.models._sparse_memory import Memory
from raysparse.models._sparse_product_training import SparseLayer
from raysparse.models._sparse_products import Kernel, SparseProduct, with_sparse_products
from raysparse.train import runtime

HALF = torch.autocast("cpu", torch.bfloat16)
kernel = pytest.mark.skipif(not _cpu.VDPBF16PS, reason="a CPU without vdpbf16ps (avx512_bf16)")
shapes = st.one_of(
    st.tuples(st.integers(1, 40).map(lambda n: 2 * n), st.integers(1, 300).map(lambda n: 2 * n)),
    st.tuples(
        *(st.integers(1, 20).map(lambda n: 2 * n), st.integers(1, 20).map(lambda n: 2 * n)),
        *(st.integers(1, 3), st.integers(1, 3)),
    ),
)
seeds = st.integers(0, 2**31)


@pytest.fixture(scope="module", autouse=True)
def small_layers_too() -> Iterator[None]:
    """Layers of tests are so small that PyTorch would be faster, as pairs are not on every CPU that has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_sparse_products, "_SMALL", 0)
        patch.setattr(_cpu, "PAIRS", _cpu.VDPBF16PS)
        patch.setattr(pairs, "in_blocks", lambda weight: False)
        for module in (_sparse_products, _sparse_product_training):
            patch.setattr(module, "_PAIRS", _sparse_products.Costs(0, 0, 0))
        patch.setattr(_sparse_product_training, "_OF_PAIRS", 0)
        yield


def thinned(
    shape: tuple[int, ...], density: float, seed: int, padding: int = 0, same: int = 1
) -> tuple[nn.Module, Tensor]:
    """A linear layer, or a convolution, of rounded numbers, and its mask; same: outputs under the same mask."""
    draw = torch.Generator().manual_seed(seed)
    outputs, inputs, *window = shape
    layer = (
        nn.Conv2d(inputs, outputs, (window[0], window[1]), padding=padding) if window else nn.Linear(inputs, outputs)
    )
    mask = torch.rand(shape, generator=draw) < density
    mask = mask[::same].repeat_interleave(same, 0)[:outputs]
    with torch.no_grad():
        layer.weight.copy_((torch.randn(shape, generator=draw) * mask).bfloat16())
        assert isinstance(layer.bias, Tensor)
        layer.bias.normal_(generator=draw)
    return layer, mask


def laid_out(layer: nn.Module) -> SparseProduct:
    product = SparseProduct(layer, Memory())
    product.lay_out()
    return product


def inputs_of(shape: tuple[int, ...], seed: int) -> Tensor:
    """600 tokens, or 720 pixels."""
    of = (2, 300, shape[1]) if len(shape) == 2 else (2, shape[1], 18, 20)
    return torch.randn(of, generator=torch.Generator().manual_seed(seed + 1)).bfloat16()


def near(got: Tensor, want: Tensor, bits: int = 8) -> bool:
    return torch.allclose(got.float(), want.float(), rtol=2.0**-bits, atol=2.0**-bits * 1e-2 * float(want.abs().max()))


@pytest.mark.usefixtures("compiler")
def test_numbers_that_are_multiplied_with_each_other_lie_at_one_place() -> None:
    draw = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(size, generator=draw).bfloat16() for size in ((6, 4, 3, 2), (2, 4, 7, 8)))
    want = F.conv2d(x.double(), weight.double())
    beside = pairs.of_channels(native.load(pairs.SOURCE), x, (0, 0))
    assert beside.shape == (2, 2, 7, 8)
    two = torch.stack(
        [F.unfold(part.float(), (3, 2)) for part in beside.view(torch.bfloat16).unflatten(3, (-1, 2)).unbind(4)], 2
    )
    products = Kernel(weight.shape, Memory(), in_pairs=True)
    products.count(weight != 0)
    products.lay_out()
    values = products.values(weight.float()).view(torch.bfloat16).view(6, -1, 2)
    got = torch.einsum("opk,bpkn->bon", values.double(), two.double())
    assert torch.allclose(got.view_as(want), want)
    tokens = torch.randn(5, 4, generator=draw)
    assert torch.equal(pairs.of_features(tokens), tokens.bfloat16())
    between = torch.randn(21, generator=draw).bfloat16()[1:]
    assert torch.equal(pairs.of_features(between), between)
    assert pairs.of_features(between).data_ptr() % 4 == 0, "it begins between two pairs"


@pytest.mark.usefixtures("compiler")
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 3).map(lambda n: 2 * n), st.integers(4, 40), st.integers(4, 40)),
    padding=st.tuples(st.integers(-1, 2), st.integers(-1, 2)),
    turned=st.booleans(),
    seed=seeds,
)
def test_channels_are_rounded_as_pytorch_does_and_padded(
    size: tuple[int, int, int, int], padding: tuple[int, int], turned: bool, seed: int
) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 1e3
    x.view(-1)[:6] = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.4e38, 1e-40, -0.0])
    if turned:
        x = x.to(memory_format=torch.channels_last)
    up, side = padding
    want = F.pad(x.bfloat16(), (side, side, up, up)).unflatten(1, (-1, 2)).movedim(2, -1)
    library = native.load(pairs.SOURCE)
    for of in (x, x.bfloat16()):
        found = pairs.of_channels(library, of, padding)
        got = found.view(torch.bfloat16).view(want.shape)
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.nan_to_num(), want.nan_to_num())


@kernel
@pytest.mark.usefixtures("compiler")
@settings(max_examples=60)
@given(shape=shapes, density=st.floats(0, 0.5), padding=st.integers(0, 2), same=st.sampled_from([1, 4]), seed=seeds)
def test_a_layer_in_sampling(shape: tuple[int, ...], density: float, padding: int, same: int, seed: int) -> None:
    layer, _ = thinned(shape, density, seed, padding, same)
    x = inputs_of(shape, seed)
    with HALF, torch.no_grad():
        fast = laid_out(layer)
        got = fast(x)
        assert torch.equal(got, fast(x.float()))
        assert torch.equal(
            got, fast(x.to(memory_format=torch.channels_last) if len(shape) == 4 else x.mT.contiguous().mT)
        )
    assert got.dtype == torch.bfloat16
    assert near(got, layer(x.float()).detach())


@kernel
@pytest.mark.usefixtures("compiler")
@settings(max_examples=60)
@given(shape=shapes, density=st.floats(0, 1), padding=st.integers(0, 2), same=st.sampled_from([1, 4]), seed=seeds)
def test_a_layer_in_training(shape: tuple[int, ...], density: float, padding: int, same: int, seed: int) -> None:
    layer, mask = thinned(shape, density, seed, padding, same)
    x, dy = inputs_of(shape, seed), torch.empty(0)
    with HALF:
        step = SparseLayer(layer, Memory())
    step.lay_out(mask)
    assert step.in_pairs
    found = []
    for network, given_x in ((layer, x.float()), (step, x)):
        given_x = given_x.clone().requires_grad_()
        layer.zero_grad()
        y = network(given_x)
        if not len(dy):
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed + 2)).bfloat16()
        y.backward(dy.to(y.dtype))
        grads = (layer.weight.grad, layer.bias.grad)
        assert given_x.grad is not None
        found.append([y.detach(), given_x.grad, *(part.clone() for part in grads if isinstance(part, Tensor))])
    want, got = found
    assert [part.dtype for part in got] == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert not got[2][~mask].any()
    assert near(got[0], want[0])
    assert near(got[1], want[1])
    assert torch.allclose(got[2], want[2] * mask, rtol=1e-4, atol=1e-3)
    assert torch.allclose(got[3], want[3], rtol=1e-4, atol=1e-3)


@kernel
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("shape", [(64, 700), (12, 10, 3, 3)])
def test_threads_change_nothing(shape: tuple[int, ...]) -> None:
    layer, mask = thinned(shape, 0.3, 0)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with HALF:
                step = SparseLayer(layer, Memory())
            step.lay_out(mask)
            x = inputs_of(shape, 0).requires_grad_()
            layer.zero_grad()
            y = step(x)
            y.backward(torch.ones_like(y))
            assert isinstance(layer.weight.grad, Tensor)
            assert x.grad is not None
            found.append((y.detach(), x.grad, layer.weight.grad.clone()))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@kernel
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("shape", [(8, 64), (8, 6, 3, 3)])
def test_what_is_not_finite_spreads(shape: tuple[int, ...]) -> None:
    layer, _ = thinned(shape, 1, 0)
    with HALF, torch.no_grad():
        fast = laid_out(layer)
        for value in (torch.nan, torch.inf, -torch.inf):
            x = inputs_of(shape, 0)
            x[0, :3] = value
            want, got = layer(x.float()), fast(x)
            assert torch.equal(got.isfinite(), want.isfinite())
            x = inputs_of(shape, 0)
            x[0, 1] = value  # of one token, or channel
            assert torch.equal(fast(x).isfinite(), layer(x.float()).isfinite())


@kernel
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("shape", [(8, 63), (7, 64), (8, 5, 3, 3)])
def test_odd_numbers_are_not_paired(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sparse_products, "_COSTS", _sparse_products._COSTS._replace(laid_out=0))
    monkeypatch.setattr(_cpu, "BFLOAT16", 1.0)
    layer, _ = thinned(shape, 0.1, 0)
    with HALF, torch.no_grad():
        (fast,) = with_sparse_products(nn.Sequential(layer))
        got = fast(inputs_of(shape, 0))
    assert got.dtype == torch.float32
    assert torch.allclose(got, layer(inputs_of(shape, 0).float()), rtol=1e-4, atol=1e-4)


@kernel
@pytest.mark.usefixtures("compiler")
def test_without_autocast_nothing_is_in_bfloat16() -> None:
    layer, mask = thinned((64, 64), 0.1, 0)
    assert not pairs.used(mask)
    assert laid_out(layer)(inputs_of((64, 64), 0)).dtype == torch.float32
    assert not SparseLayer(layer, Memory()).in_pairs
    with torch.autocast("cpu", torch.float16):
        assert not pairs.used(mask)


@kernel
@pytest.mark.usefixtures("compiler")
def test_a_trial_in_bfloat16_samples_as_near_to_float32_as_pytorch_does() -> None:
    trial = config.parse({
        "model": {"name": "uvit", "options": {**uvit.SMALL, "embed_dim": 64}},
        "train": {"precision": "bf16"},
        "evaluate": {"runtime": "sparse"},
    })  # fmt: skip
    model = uvit.build(uvit.Config(**trial.model.options), seed=0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)) < 0.2)
    fast = runtime.for_sampling(model, trial)
    assert any(isinstance(layer, SparseProduct) for layer in fast.modules())
    given_x = uvit.example(model.config, 6, 1)
    given_x["x"] = torch.randn(given_x["x"].shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = model(**given_x)
        with HALF:
            dense, ours = model(**given_x), fast(**given_x)
    assert float((ours.float() - exact).abs().max()) < 2 * float((dense.float() - exact).abs().max())
