"""Products in bfloat16 by blocks of 16 x 16, on a CPU with AMX: those of rounded numbers, in sampling."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from raysparse import native
from raysparse.models import _sparse_pairs as pairs
from raysparse.models import _sparse_products
from raysparse.models._sparse_memory import Memory
from raysparse.models._sparse_product_training import SparseLayer
from raysparse.models._sparse_products import SparseProduct, with_sparse_products

HALF = torch.autocast("cpu", torch.bfloat16)
SHAPES = [(16, 16), (48, 64), (32, 16, 1, 1), (32, 48, 3, 3), (16, 32, 2, 3)]


@pytest.fixture(scope="module", autouse=True)
def _kernels(compiler: None) -> None:
    """They are compiled, for this CPU or another one."""


@pytest.fixture(scope="module")
def amx() -> None:
    if not native.load(pairs.SOURCE).raysparse_blocks():
        pytest.skip("a CPU without AMX, or a system that does not let it be used")


@pytest.fixture
def _always(monkeypatch: pytest.MonkeyPatch, amx: None) -> None:
    """Layers of tests are so small that PyTorch would be faster."""
    monkeypatch.setattr(_sparse_products, "_SMALL", 0)
    monkeypatch.setattr(_sparse_products, "_FEW", 0)
    monkeypatch.setattr(_sparse_products, "_BLOCKS", _sparse_products.Costs(0, 0, 0))


def by_blocks(shape: tuple[int, ...], density: float, seed: int) -> nn.Linear | nn.Conv2d:
    """A layer of rounded numbers, in which whole blocks are 0, and in one that is not, one weight."""
    draw = torch.Generator().manual_seed(seed)
    outputs, inputs, *window = shape
    kernel = (window[0], window[1]) if window else (1, 1)
    layer = nn.Conv2d(inputs, outputs, kernel, padding=1) if window else nn.Linear(inputs, outputs)
    mask = torch.rand(outputs // 16, inputs // 16, *window, generator=draw) < density
    mask = mask.repeat_interleave(16, 0).repeat_interleave(16, 1)
    with torch.no_grad():
        layer.weight.copy_((torch.randn(shape, generator=draw) * mask).bfloat16())
        layer.weight.view(-1)[int(mask.flatten().int().argmax())] = 0
        assert layer.bias is not None
        layer.bias.normal_(generator=draw)
    return layer


def inputs_of(shape: tuple[int, ...], columns: int, seed: int) -> Tensor:
    size = (2, columns, shape[1]) if len(shape) == 2 else (2, shape[1], 5, columns)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed + 1)).bfloat16()


def laid_out(layer: nn.Module) -> SparseProduct:
    """Made under autocast."""
    product = SparseProduct(layer, Memory())
    product.lay_out()
    assert product._kernel.tile == 16
    return product


def near(got: Tensor, want: Tensor) -> bool:
    return torch.allclose(got.float(), want.float(), rtol=2.0**-8, atol=2.0**-8 * 1e-2 * float(want.abs().max()))


@pytest.mark.usefixtures("_always")
@settings(max_examples=60)
@given(shape=st.sampled_from(SHAPES), density=st.floats(0, 1), columns=st.integers(1, 90), seed=st.integers(0, 2**31))
def test_a_layer_in_sampling(shape: tuple[int, ...], density: float, columns: int, seed: int) -> None:
    layer, x = by_blocks(shape, density, seed), inputs_of(shape, columns, seed)
    with HALF, torch.no_grad():
        fast = laid_out(layer)
        got = fast(x)
        assert torch.equal(got, fast(x.float()))
        if len(shape) == 2:
            assert torch.equal(got, fast(x.mT.contiguous().mT)), "as attention gets the pixels of an image"
    assert got.dtype == torch.bfloat16
    assert near(got, layer(x.float()).detach())


@pytest.mark.usefixtures("_always")
def test_tokens_whose_strides_or_place_are_odd() -> None:
    layer, x = by_blocks((48, 64), 0.5, 0), inputs_of((48, 64), 20, 0).view(40, 64)
    of_one_pixel = x.view(40, 64, 1, 1).flatten(2).mT
    assert of_one_pixel.stride() == (64, 1, 1)
    behind_one = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(40, 64)
    with HALF, torch.no_grad():
        fast = laid_out(layer)
        want = fast(x)
        assert torch.equal(fast(of_one_pixel), want.view(40, 1, 48))
        assert torch.equal(fast(behind_one), want)


@pytest.mark.usefixtures("_always")
@pytest.mark.parametrize("shape", SHAPES)
def test_threads_change_nothing(shape: tuple[int, ...]) -> None:
    layer, x, before = by_blocks(shape, 0.5, 0), inputs_of(shape, 300, 0), torch.get_num_threads()
    found = []
    try:
        with HALF, torch.no_grad():
            fast = laid_out(layer)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(fast(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.usefixtures("_always")
@pytest.mark.parametrize("shape", [(32, 64), (32, 64, 3, 3)])
def test_what_is_not_finite_spreads_to_outputs_whose_blocks_take_it(shape: tuple[int, ...]) -> None:
    layer, x = by_blocks(shape, 0.4, 3), inputs_of(shape, 40, 3)
    place = (0, 7, 20) if len(shape) == 2 else (0, 20, 2, 7)
    x[place] = torch.inf
    with HALF, torch.no_grad():
        finite = laid_out(layer)(x).isfinite()
    taken = (layer.weight[:, 20] != 0).view(2, 16, -1).any(1).any(1).repeat_interleave(16)
    found = finite[0, 7] if len(shape) == 2 else finite[0, :, 1:4, 6:9].all(2).all(1)
    assert torch.equal(found, ~taken)
    assert finite[1].all()


@pytest.mark.usefixtures("_always")
def test_pytorchs_own_products_go_on_between_them() -> None:
    """They keep their tiles' shapes in the CPU from call to call."""
    layer, dense, x = by_blocks((64, 64), 0.3, 0), nn.Linear(64, 100), inputs_of((64, 64), 70, 0)
    with HALF, torch.no_grad():
        fast = laid_out(layer)
        first = [fast(x), dense(x)]
        for _ in range(3):
            assert all(torch.equal(got, want) for got, want in zip((fast(x), dense(x)), first, strict=True))


def test_whole_blocks() -> None:
    mask = torch.zeros(32, 48, dtype=torch.bool)
    mask[3, 17] = mask[31, 47] = True
    found = pairs.whole_blocks(mask)
    assert found[:16, 16:32].all()
    assert found[16:, 32:].all()
    assert found.sum() == 2 * 256
    of_window = torch.zeros(16, 16, 3, 3, dtype=torch.bool)
    of_window[5, 3, 1, 2] = True
    found = pairs.whole_blocks(of_window)
    assert found[:, 2:4, 1, 2].all()
    assert found.sum() == 2 * 16


@pytest.mark.parametrize("shape", [(512, 512), (128, 128, 3, 3)])
def test_blocks_pay_where_few_are_left(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "in_blocks", lambda weight: True)
    for density, blocks in ((0.25, True), (0.85, False)):
        kernel, pays = _sparse_products._kernel_of(by_blocks(shape, density, 0).weight, Memory())
        assert (kernel.tile == 16) is blocks
        assert pays or not blocks
    weight = torch.randn(shape) * (torch.rand(shape) < 0.1)
    assert _sparse_products._kernel_of(weight, Memory())[0].tile == 1, "each block has a weight left"


def test_where_they_can_be() -> None:
    assert not pairs.in_blocks(torch.ones(64, 64)), "float32"
    with HALF:
        assert not pairs.in_blocks(torch.ones(64, 24))
        assert not pairs.in_blocks(torch.ones(40, 64))


@pytest.mark.usefixtures("_always")
def test_in_training_there_are_none() -> None:
    layer = by_blocks((64, 64), 0.3, 0)
    with HALF:
        product = SparseLayer(layer, Memory())
    product.lay_out(layer.weight != 0)
    assert product.kernel.tile < 16


@pytest.mark.usefixtures("_always")
def test_a_model_samples_so() -> None:
    layer = by_blocks((64, 64), 0.3, 0)
    model, x = nn.Sequential(layer, nn.GELU()), inputs_of((64, 64), 40, 0)
    with HALF, torch.no_grad():
        fast = with_sparse_products(model)
        assert type(fast[0]) is SparseProduct
        got = fast[0](x)
        assert torch.equal(fast(x), nn.functional.gelu(got))
    assert near(got, layer(x.float()).detach())
