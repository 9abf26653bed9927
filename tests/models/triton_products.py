"""Products by Triton kernels equal dense ones: on the GPU at hand or, with TRITON_INTERPRET=1, interpreted on the CPU.

test_models_cuda_products.py runs it in a process of its own, as triton reads that variable once.
"""

from __future__ import annotations

from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from raysparse.models import _cuda_products, _sparse_product_training, uvit
from raysparse.models._cuda_product_training import BlockLayer, BlockMlp, lay_out_all
from raysparse.models._cuda_products import EDGES, BlockProduct
from raysparse.models._sparse_product_training import SparseStep

torch.backends.cudnn.allow_tf32 = False  # else the convolutions that are compared with are rounded
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

# Triton's interpreter holds a bfloat16 as an integer, and its tl.dot multiplies those.
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16

LAYERS = ("qkv", "roj", "fc1", "fc2")
seeds = st.integers(0, 2**31)
Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def filled(layer: Layer, mask: Tensor, draw: torch.Generator, dtype: torch.dtype) -> Layer:
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


def of_blocks(used: Tensor, edge: int) -> Tensor:
    return used.repeat_interleave(edge, 0).repeat_interleave(edge, 1)


@settings(max_examples=30)
@given(
    edge=st.sampled_from([16, 32, 64]),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    tokens=st.integers(1, 150),
    density=st.floats(0, 1),
    bias=st.booleans(),
    gelu=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, HALF]),
    seed=seeds,
)
def test_blocks(
    edge: int,
    rows: int,
    columns: int,
    tokens: int,
    density: float,
    bias: bool,
    gelu: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    draw = torch.Generator().manual_seed(seed)
    layer = nn.Linear(columns * edge, rows * edge, bias=bias)
    filled(layer, of_blocks(torch.rand(rows, columns, generator=draw) < density, edge), draw, dtype)
    product, x = BlockProduct(layer, edge), drawn((2, tokens, columns * edge), draw, dtype)
    product.gelu = gelu
    assert same(product, nn.Sequential(layer, nn.GELU()) if gelu else layer, x)


def test_a_convolution_of_kernel_1() -> None:
    draw = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(256, 64, 1)
    filled(layer, of_blocks(torch.eye(1, 4).bool(), 64), draw, torch.float32)
    product, x = _cuda_products.product_of(layer), drawn((3, 256, 5, 7), draw, torch.float32)
    assert isinstance(product, BlockProduct)
    assert same(product, layer, x)
    x = x.to(memory_format=torch.channels_last)
    assert same(product, layer, x)
    assert product(x).is_contiguous(memory_format=torch.channels_last)


def blocked_model(draw: torch.Generator) -> uvit.UViT:
    """All its layers in blocks of 64, a quarter of which are left, and no unit without one."""
    model = uvit.build(uvit.Config(sample_size=8, embed_dim=256, depth=2, num_heads=4), seed=0).eval()
    for name, layer in model.named_modules():
        if name.endswith((".qkv", ".proj", ".fc1", ".fc2")):
            assert isinstance(layer, nn.Linear)
            rows, columns = layer.out_features // 64, layer.in_features // 64
            fewer = min(rows, columns)
            used = torch.arange(rows)[:, None] % fewer == torch.arange(columns) % fewer
            filled(layer, of_blocks(used, 64), draw, torch.float32)
    return model.to(DEVICE)


def test_a_model() -> None:
    draw = torch.Generator().manual_seed(0)
    model = blocked_model(draw).requires_grad_(False)
    given = uvit.example(model.config, batch=2, points=1, device=DEVICE)
    given["x"].copy_(torch.randn(2, 3, 8, 8, generator=draw))
    fast, want = _cuda_products.with_sparse_products(model), model(**given)
    kinds = [type(module) for module in fast.modules()]
    assert (kinds.count(BlockProduct), kinds.count(nn.GELU)) == (12, 0)
    assert float((fast(**given) - want).abs().max()) < 1e-5 * float(want.abs().max())
    with torch.autocast(DEVICE, dtype=HALF):
        half = _cuda_products.with_sparse_products(model)
        assert half.middle.fc1.dtype == HALF
        assert float((half(**given) - model(**given)).abs().max()) < 0.05 * float(want.abs().max())


@settings(max_examples=8)
@given(
    edge=st.sampled_from([32, 64]),
    sides=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    tokens=st.integers(1, 300),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, HALF]),
    seed=seeds,
)
def test_a_layer_in_training(
    edge: int, sides: tuple[int, int], tokens: int, bias: bool, dtype: torch.dtype, seed: int
) -> None:
    """Forward and gradients, before and after the blocks have changed, in the same tensors; the same bits each time."""
    draw = torch.Generator().manual_seed(seed)
    layer = nn.Linear(sides[1] * 64, sides[0] * 64, bias=bias)
    fast = BlockLayer(filled(layer, torch.ones_like(layer.weight), draw, dtype))
    x = drawn((2, tokens, layer.in_features), draw, dtype).requires_grad_()
    dy, places = drawn((2, tokens, layer.out_features), draw, dtype), set()
    for _ in range(2):
        mask = of_blocks(chosen((sides[0] * 64 // edge, sides[1] * 64 // edge), EDGES[edge], draw), edge).to(DEVICE)
        lay_out_all({fast: mask})
        assert fast.blocked
        places.add(tuple(buffer.data_ptr() for buffer in fast.buffers()))
        with torch.no_grad():
            layer.weight.copy_(drawn(tuple(mask.shape), draw, dtype)).mul_(mask)
        wanted = [x, *layer.parameters()]
        got, want = fast(x), nn.functional.linear(x.float(), *(p.float() for p in layer.parameters()))
        assert near(got, want)
        found, again = (torch.autograd.grad(got, wanted, dy, retain_graph=True) for _ in range(2))
        exact = torch.autograd.grad(want, wanted, dy.float())
        assert all(map(torch.equal, found, again))
        assert near(found[0], exact[0])
        assert near(found[1] * mask, exact[1] * mask)
        assert not found[1][~of_blocks(_cuda_products.blocks(mask, fast.edge), fast.edge)].any()
        assert not bias or near(found[2], exact[2])
    assert len(places) == 1 or not mask.any()  # no block is of any edge


def chosen(shape: tuple[int, int], share: float, draw: torch.Generator) -> Tensor:
    """bool of that shape: as many as the share allows."""
    count = shape[0] * shape[1]
    used = torch.zeros(count, dtype=torch.bool)
    used[torch.randperm(count, generator=draw)[: int(share * count)]] = True
    return used.view(shape)


@settings(max_examples=4)
@given(
    sides=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3)),
    tokens=st.integers(1, 300),
    edges=st.tuples(st.sampled_from([32, 64]), st.sampled_from([32, 64])),
    dtype=st.sampled_from([torch.float32, HALF]),
    seed=seeds,
)
def test_an_mlp_in_training(
    sides: tuple[int, int, int], tokens: int, edges: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    """Its output and all gradients are those of its layers with GELU between them; the same bits each time."""
    draw = torch.Generator().manual_seed(seed)
    inputs, wide, outputs = (64 * side for side in sides)
    layers, masks = [nn.Linear(inputs, wide), nn.Linear(wide, outputs)], []
    blocked = []
    for layer, edge in zip(layers, edges, strict=True):
        rows, columns = layer.weight.shape
        mask = of_blocks(chosen((rows // edge, columns // edge), EDGES[edge], draw), edge)
        blocked.append(BlockLayer(filled(layer, mask, draw, dtype)))
        lay_out_all({blocked[-1]: mask.to(DEVICE)})
        masks.append(mask.to(DEVICE))
    mlp = BlockMlp(*blocked)
    x = drawn((2, tokens, inputs), draw, dtype).requires_grad_()
    dy = drawn((2, tokens, outputs), draw, dtype)
    wanted = [x, *layers[0].parameters(), *layers[1].parameters()]
    got = mlp(x)
    exact = [parameter.float() for layer in layers for parameter in layer.parameters()]
    hidden = nn.functional.gelu(nn.functional.linear(x.float(), *exact[:2]))
    want = nn.functional.linear(hidden, *exact[2:])
    assert near(got, want)
    found, again = (torch.autograd.grad(got, wanted, dy, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, found, again))
    theirs = torch.autograd.grad(want, wanted, dy.float())
    for place, mask in ((0, 1), (1, masks[0]), (2, 1), (3, masks[1]), (4, 1)):
        assert near(found[place] * mask, theirs[place] * mask), place


def test_an_mlp_of_which_a_layer_is_not_by_blocks_is_its_layers() -> None:
    draw = torch.Generator().manual_seed(0)
    layers = [nn.Linear(64, 64), nn.Linear(64, 64)]
    masks = [torch.zeros(64, 64, dtype=torch.bool), torch.rand(64, 64, generator=draw) < 0.5]
    blocked = []
    for layer, mask in zip(layers, masks, strict=True):
        blocked.append(BlockLayer(filled(layer, mask, draw, torch.float32)))
        lay_out_all({blocked[-1]: mask.to(DEVICE)})
    x = drawn((3, 64), draw, torch.float32)
    assert [layer.blocked for layer in blocked] == [True, False]
    assert near(BlockMlp(*blocked)(x), layers[1](nn.functional.gelu(layers[0](x))))


def test_gradients_of_weights_are_not_rounded() -> None:
    """Under autocast; float16 rounds by 3e-4, bfloat16 by 2e-3, tensor cores add up less exactly than float32."""
    draw = torch.Generator().manual_seed(0)
    layer, mask = nn.Linear(256, 64), of_blocks(torch.eye(1, 4).bool(), 64)
    fast, x = BlockLayer(filled(layer, mask, draw, torch.float32)), drawn((500, 256), draw, HALF)
    lay_out_all({fast: mask.to(DEVICE)})
    dy = drawn((500, 64), draw, HALF)
    with torch.autocast(DEVICE, dtype=HALF):
        y = fast(x)
    found = torch.autograd.grad(y, [*layer.parameters()], dy)
    want = (dy.double().T @ x.double() * mask.to(DEVICE), dy.double().sum(0))
    for got, exact in zip(found, want, strict=True):
        assert got.dtype == torch.float32
        assert float((got - exact).norm() / exact.norm()) < 5e-5


def near(got: Tensor, want: Tensor) -> bool:
    got, want = got.detach(), want.detach()
    return float((got.float() - want.float()).norm()) <= TOLERANCES[got.dtype] * float(want.float().norm()) + 1e-4


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.skipif(DEVICE == "cpu", reason="interpreted"))]
)
def test_a_training_step(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of active weights, and through a change of masks what was compiled stays."""
    monkeypatch.setattr(_sparse_product_training, "_on_cuda", lambda _: True)
    draw = torch.Generator().manual_seed(0)
    model = blocked_model(draw)
    masks = {name: weight != 0 for name, weight in model.named_parameters() if name.rpartition(".")[0][-3:] in LAYERS}
    step, compilations = SparseStep(model, masks), []
    assert sum(type(module) is BlockMlp for module in step._network[0].modules()) == 3

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        compilations.append(graph)
        return graph.forward

    network = torch.compile(step, backend=backend, dynamic=False, fullgraph=True) if compiled else step
    given = uvit.example(model.config, batch=2, points=1, device=DEVICE)
    given["x"].copy_(torch.randn(2, 3, 8, 8, generator=draw))
    for turn in range(2):
        if turn:
            masks = {name: mask.roll(64, 0) for name, mask in masks.items()}
            with torch.no_grad():
                for name in masks:
                    weight = model.get_parameter(name)
                    weight.copy_(weight.roll(64, 0))
            step.follow(masks)
        ours, theirs = [], []
        for run, into in ((network, ours), (model, theirs)):
            model.zero_grad()
            found = run(**given)
            (found * found.detach()).sum().backward()
            into += [found.detach(), *(p.grad * masks.get(n, True) for n, p in model.named_parameters())]
        for got, want in zip(ours, theirs, strict=True):
            assert near(got, want)
    assert len(compilations) == compiled
