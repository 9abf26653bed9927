"""What a CUDA device can leave out of a layer, and what it refuses. Its kernels run interpreted, or on a GPU."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from raysparse import plugins
from raysparse.errors import UsageError
from raysparse.models import _cuda_products, uvit
from raysparse.models._cuda_products import BlockProduct, DiagonalProduct, product_of
from raysparse.sparse import SparseEngine

PRODUCTS = Path(__file__).parent / "triton_products.py"


def run_products(tmp_path: Path, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(PRODUCTS)],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)} | environment,
        cwd=PRODUCTS.parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout


@pytest.mark.slow
def test_interpreted_kernels_compute_what_dense_layers_do(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    run_products(tmp_path, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
def test_on_a_gpu_they_do_too(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    run_products(tmp_path)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("edge", [16, 32, 64])
def test_blocks_in_bfloat16_are_compiled_to_tensor_cores(
    edge: int, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which needs no device."""
    triton = pytest.importorskip("triton")
    compiler, backends = (importlib.import_module(f"triton.{name}") for name in ("compiler", "backends.compiler"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"BIASED": True, "TOKENS": 128, "EDGE": edge, "PRECISION": "ieee"}
    kernel = _cuda_products.kernels()._block
    tensors = dict.fromkeys(("x", "values", "bias", "y"), "*bf16") | dict.fromkeys(("columns", "starts"), "*i32")
    given = tensors | dict.fromkeys(constants, "constexpr")
    source = compiler.ASTSource(
        fn=kernel,
        signature={name: given.get(name, "i32") for name in kernel.arg_names},
        constexprs=constants,
    )
    made = triton.compile(source, target=backends.GPUTarget("cuda", capability, 32))
    assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in made.asm["ptx"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own compiler
def test_kernels_are_part_of_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """None breaks it, as a question to PyTorch's settings did at each layer. No device: the graph is not run."""
    pytest.importorskip("triton")
    from torch.utils import _triton

    monkeypatch.setattr(_triton, "has_triton", lambda *_: True)  # which looks for a device
    model = nn.Sequential(masked((96, 64), pattern="block", block=16), masked((80, 96), pattern="diagonal"))
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return lambda *_: (torch.zeros(2, 5, 80),)

    with torch.no_grad():
        torch.compile(_cuda_products.with_sparse_products(model), backend=backend, fullgraph=True)(
            torch.zeros(2, 5, 64)
        )
    torch._dynamo.reset()
    (graph,) = graphs
    assert sum("triton_kernel_wrapper" in str(node.target) for node in graph.graph.nodes) == 2


def masked(shape: tuple[int, int], **settings: Any) -> nn.Linear:
    """A linear layer [outputs, inputs] under a pattern's mask, weights drawn everywhere else."""
    layer = nn.Linear(shape[1], shape[0])
    optimizer = torch.optim.SGD(layer.parameters())
    SparseEngine(layer, optimizer, method="static", allocation="uniform", **{"sparsity": 0.8} | settings)
    return layer


@pytest.mark.parametrize("edge", [16, 32, 64])
@pytest.mark.parametrize("shape", [(192, 320), (320, 192)])
def test_blocks_are_found(edge: int, shape: tuple[int, int]) -> None:
    product = product_of(masked(shape, pattern="block", block=edge))
    assert isinstance(product, BlockProduct)
    assert product.values.shape == (round(0.2 * shape[0] * shape[1] / edge**2), edge, edge)


@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (48, 48)])
def test_diagonals_are_found(shape: tuple[int, int]) -> None:
    layer = masked(shape, pattern="diagonal")
    assert int(_cuda_products.diagonals(layer.weight).sum()) == round(0.2 * max(shape))
    assert isinstance(product_of(layer), DiagonalProduct)


def test_a_tall_layer_leaves_out_the_tiles_that_a_diagonal_does_not_meet() -> None:
    product = product_of(masked((256, 16), pattern="diagonal", sparsity=0.875))
    assert isinstance(product, DiagonalProduct)
    # A diagonal of 16 weights meets one of the 4 tiles of 64 outputs, or two.
    assert 32 <= len(product.shifts) <= 64
    assert int(product.starts[-1]) == len(product.shifts) == len(product.values)


def test_two_of_four_is_told_from_its_weights() -> None:
    layer = masked((32, 64), pattern="nm", sparsity=0.5)
    assert _cuda_products.is_two_of_four(layer.weight)
    assert not _cuda_products.is_two_of_four(masked((32, 64), sparsity=0.5).weight)
    with torch.no_grad():
        layer.weight[3, 4:8] = torch.tensor([1.0, 0.0, 2.0, 3.0])
    assert not _cuda_products.is_two_of_four(layer.weight)
    assert product_of(layer) == "its zeros are single ones"


def test_what_two_of_four_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = masked((32, 64), pattern="nm", sparsity=0.5)
    assert product_of(layer) == ("2:4 is for bfloat16 and float16 (train.precision: bf16), the model computes float32")
    assert product_of(masked((24, 64), pattern="nm", sparsity=0.5).half()) == (
        "2:4 takes multiples of 16 outputs and inputs, not 24 x 64"
    )
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert product_of(layer.bfloat16()) == "2:4 needs a PyTorch with cuSPARSELt"
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert product_of(layer) == "2:4 needs compute capability 8.0, the GPU has 7.5"


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_two_of_four_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    layer = masked((96, 64), pattern="nm", sparsity=0.5).cuda().bfloat16()
    product, x = product_of(layer), torch.randn(3, 50, 64, device="cuda", dtype=torch.bfloat16)
    assert isinstance(product, _cuda_products.TwoOfFourProduct)
    torch.testing.assert_close(product(x), layer(x), rtol=0, atol=3e-2)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (masked((64, 64)), "its zeros are single ones"),
        (masked((64, 64), pattern="block", block=4), "its zeros are single ones"),
        (masked((64, 64), sparsity=0.1), None),
        (nn.LayerNorm(4), None),
        (nn.Conv2d(64, 64, 3), None),
    ],
    ids=["element", "small blocks", "few zeros", "norm", "no zeros"],
)
def test_what_stays_dense(layer: nn.Module, reason: str | None) -> None:
    assert product_of(layer) == reason


def test_a_convolution_with_a_kernel_stays_dense() -> None:
    layer = nn.Conv2d(16, 16, 3)
    with torch.no_grad():
        layer.weight[:8] = 0
    assert product_of(layer) == "convolutions with a kernel, hooks or groups"


def test_a_model_whose_zeros_no_pattern_has_is_refused() -> None:
    model = nn.Sequential(masked((64, 64)), masked((64, 64)), masked((64, 64), pattern="nm", sparsity=0.5))
    with pytest.raises(UsageError, match="no layer here: 2 layers: its zeros are single ones; 1 layers: 2:4 is"):
        _cuda_products.with_sparse_products(model)


def test_a_dense_model_and_one_with_some_patterns_are_not() -> None:
    assert isinstance(_cuda_products.with_sparse_products(nn.Sequential(nn.Linear(4, 4)))[0], nn.Linear)  # type: ignore[index]
    fast = _cuda_products.with_sparse_products(nn.Sequential(masked((64, 64)), masked((64, 64), pattern="diagonal")))
    assert [type(module) for module in fast.children()] == [nn.Linear, DiagonalProduct]


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "raysparse.models._triton_products", raising=False)
    with pytest.raises(UsageError, match=r"kernels need triton, .*: pip install triton"):
        _cuda_products.with_sparse_products(nn.Sequential(masked((64, 64), pattern="diagonal")))


@pytest.mark.parametrize(("pattern", "fewer"), [("block", True), ("diagonal", False)])
def test_dead_units_go_where_that_leaves_the_pattern_whole(pattern: str, fewer: bool) -> None:
    model = uvit.build(uvit.Config(sample_size=8, embed_dim=64, depth=2, num_heads=4), seed=0)
    SparseEngine(model, torch.optim.SGD(model.parameters()), method="static", sparsity=0.9, pattern=pattern)
    with torch.no_grad():
        model.middle.fc1.weight[:16] = 0
        model.middle.fc2.weight[:, :16] = 0
    fast = _cuda_products.with_sparse_products(model)
    assert isinstance(fast, uvit.UViT)
    first = fast.middle.fc1
    assert isinstance(first, BlockProduct | DiagonalProduct)
    assert (first.outputs < 256) == fewer


@pytest.mark.parametrize("name", ["uvit", "ddpm_unet", "latent_unet"])
def test_models_of_pictures_take_these_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda_products, "with_sparse_products", lambda model: ["taken", model])
    model = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device("cuda"))]))
    assert plugins.load("models", name).sparse_runtime(model) == ["taken", model]
