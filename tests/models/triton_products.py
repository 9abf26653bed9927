"""Products by Triton kernels equal dense ones: on the GPU at hand or, with TRITON_INTERPRET=1, interpreted on the CPU.

test_models_cuda_products.py runs it in a process of its own, as triton reads that variable once.
"""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from raysparse.models import _cuda_products, uvit
from raysparse.models._cuda_products import BlockProduct, DiagonalProduct

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

# Triton's interpreter holds a bfloat16 as an integer, and its tl.dot multiplies those.
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16

seeds = st.integers(0, 2**31)


def filled(layer: nn.Linear | nn.Conv2d, mask: Tensor, draw: torch.Generator, dtype: torch.dtype) -> nn.Module:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=draw)
        layer.weight.div_(layer.weight[0].numel() ** 0.5).mul_(mask.view_as(layer.weight))
    return layer.to(DEVICE, dtype)


def same(product: nn.Module, layer: nn.Module, x: Tensor) -> bool:
    got, want = product(x), layer.float()(x.float()).detach()
    assert got.dtype == x.dtype
    assert got.shape == want.shape
    return torch.allclose(got.float(), want, rtol=0, atol=TOLERANCES[x.dtype] * max(1, float(want.abs().max())))


def drawn(shape: tuple[int, ...], draw: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=draw).to(DEVICE, dtype)


def of_diagonals(outputs: int, inputs: int, density: float, draw: torch.Generator) -> Tensor:
    o, i = torch.arange(outputs)[:, None], torch.arange(inputs)
    apart = i - o if outputs <= inputs else o - i
    return (torch.rand(max(outputs, inputs), generator=draw) < density)[apart % max(outputs, inputs)]


@settings(max_examples=30, deadline=None)
@given(
    edge=st.sampled_from([16, 32, 64]),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    tokens=st.integers(1, 150),
    density=st.floats(0, 1),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, HALF]),
    seed=seeds,
)
def test_blocks(
    edge: int, rows: int, columns: int, tokens: int, density: float, bias: bool, dtype: torch.dtype, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=draw) < density
    layer = nn.Linear(columns * edge, rows * edge, bias=bias)
    filled(layer, mask.repeat_interleave(edge, 0).repeat_interleave(edge, 1), draw, dtype)
    assert same(BlockProduct(layer, edge), layer, drawn((2, tokens, columns * edge), draw, dtype))


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 150), st.integers(1, 150), st.integers(1, 70)),
    density=st.floats(0, 0.2),
    bias=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCES)),
    seed=seeds,
)
def test_diagonals(sizes: tuple[int, int, int], density: float, bias: bool, dtype: torch.dtype, seed: int) -> None:
    outputs, inputs, tokens = sizes
    draw = torch.Generator().manual_seed(seed)
    layer = nn.Linear(inputs, outputs, bias=bias)
    filled(layer, of_diagonals(outputs, inputs, density, draw), draw, dtype)
    assert same(DiagonalProduct(layer), layer, drawn((2, tokens, inputs), draw, dtype))


def test_a_convolution_of_kernel_1() -> None:
    draw = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(32, 48, 1)
    filled(layer, torch.eye(3, 2).bool().repeat_interleave(16, 0).repeat_interleave(16, 1), draw, torch.float32)
    product, x = _cuda_products.product_of(layer), drawn((3, 32, 5, 7), draw, torch.float32)
    assert isinstance(product, BlockProduct)
    assert same(product, layer, x)
    x = x.to(memory_format=torch.channels_last)
    assert same(product, layer, x)
    assert product(x).is_contiguous(memory_format=torch.channels_last)


def test_a_model() -> None:
    config = uvit.Config(sample_size=8, embed_dim=64, depth=2, num_heads=2)
    model = uvit.build(config, seed=0).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    for name, layer in model.named_modules():
        if name.endswith((".qkv", ".proj", ".fc1", ".fc2")):
            assert isinstance(layer, nn.Linear)
            units = torch.rand(layer.out_features // 16, layer.in_features // 16, generator=draw) < 0.2
            filled(layer, units.repeat_interleave(16, 0).repeat_interleave(16, 1), draw, torch.float32)
    model.middle.qkv.weight.data.copy_(torch.randn(192, 64, generator=draw) * of_diagonals(192, 64, 0.2, draw))
    model.to(DEVICE)
    given = uvit.example(config, batch=2, points=1, device=DEVICE)
    given["x"].copy_(torch.randn(2, 3, 8, 8, generator=draw))
    fast, want = _cuda_products.with_sparse_products(model), model(**given)
    kinds = [type(module) for module in fast.modules()]
    assert (kinds.count(BlockProduct), kinds.count(DiagonalProduct)) == (11, 1)
    assert float((fast(**given) - want).abs().max()) < 1e-5 * float(want.abs().max())
    with torch.autocast(DEVICE, dtype=HALF):
        half = _cuda_products.with_sparse_products(model)
        assert half.middle.fc1.dtype == HALF
        assert float((half(**given) - model(**given)).abs().max()) < 0.05 * float(want.abs().max())
