"""What a CUDA device can leave out of a layer, and what it refuses. Its kernels run interpreted, or on a GPU."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bare_script import run_kernels
from torch import Tensor, nn

from raysparse import plugins
from raysparse.errors import UsageError
from raysparse.models import _cuda_products, uvit
from raysparse.models._cuda_product_training import BlockLayer, lay_out_all
from raysparse.models._cuda_products import BlockProduct, product_of
from raysparse.sparse import SparseEngine

FILE = "triton_products.py"


@pytest.mark.slow
def test_interpreted_kernels_compute_what_dense_layers_do(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    assert "8 passed, 1 skipped" in run_kernels(FILE, tmp_path, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@pytest.mark.timeout(900)  # some hundred kernels are compiled first
def test_on_a_gpu_they_do_too(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert "9 passed" in run_kernels(FILE, tmp_path)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("edge", [32, 64])
@pytest.mark.parametrize(
    ("name", "gelu"),
    [
        ("_block", {"GELU": True}),
        ("_block", {"GELU": True, "KEEP": True}),
        ("_block", {"BACK": True}),
        ("_block_sums", {}),
    ],
    ids=["gelu", "into gelu", "from gelu", "sums"],
)
def test_blocks_in_bfloat16_are_compiled_to_tensor_cores(
    name: str, gelu: dict[str, bool], edge: int, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which needs no device."""
    triton = pytest.importorskip("triton")
    compiler, backends = (importlib.import_module(f"triton.{name}") for name in ("compiler", "backends.compiler"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants: dict[str, Any] = {"TOKENS": 64, "EDGE": edge, "PRECISION": "ieee"}
    if name == "_block":
        constants |= {"BIASED": True, "GELU": False, "KEEP": False, "BACK": False, "BY_INPUT": False} | gelu
    kernel = getattr(_cuda_products.kernels(), name)
    tensors = dict.fromkeys(("x", "values", "bias", "y", "dy", "slopes"), "*bf16") | {"sums": "*fp32"}
    tensors |= dict.fromkeys(("rows", "columns", "starts"), "*i32")
    given = tensors | dict.fromkeys(constants, "constexpr")
    source = compiler.ASTSource(
        fn=kernel,
        signature={name: given.get(name, "i32") for name in kernel.arg_names},
        constexprs=constants,
    )
    made = triton.compile(source, target=backends.GPUTarget("cuda", capability, 32))
    wide = capability == 90 and (name == "_block" or edge == 64)  # wgmma's fewest rows are 64
    assert ("wgmma.mma_async" if wide else "mma.sync") in made.asm["ptx"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own compiler
def test_kernels_are_part_of_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """None breaks it, as a question to PyTorch's settings did at each layer. No device: the graph is not run."""
    pytest.importorskip("triton")
    from torch.utils import _triton

    monkeypatch.setattr(_triton, "has_triton", lambda *_: True)  # which looks for a device
    model = nn.Sequential(masked((128, 384), pattern="block", block=64), masked((384, 128), pattern="block", block=64))
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return lambda *_: (torch.zeros(2, 5, 384),)

    with torch.no_grad():
        torch.compile(_cuda_products.with_sparse_products(model), backend=backend, fullgraph=True)(
            torch.zeros(2, 5, 384)
        )
    torch._dynamo.reset()
    (graph,) = graphs
    assert sum("triton_kernel_wrapper" in str(node.target) for node in graph.graph.nodes) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("half", [False, True])
def test_training_by_blocks_is_part_of_compiled_graphs(half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, down to the kernels, without a break and without running them."""
    triton = pytest.importorskip("triton")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    driver = SimpleNamespace(get_current_target=lambda: target)  # for what a kernel writes
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch.utils import _triton

    monkeypatch.setattr(_triton, "has_triton", lambda *_: True)  # which looks for a device
    layer = BlockLayer(masked((128, 384), pattern="block", block=64))
    lay_out_all({layer: layer.layer.weight != 0})
    graphs: list[list[str]] = []

    def compiler(graph: torch.fx.GraphModule, given: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        made = [node and node.meta.get("val") for node in list(graph.graph.nodes)[-1].args[0]]
        return make_boxed_func(
            lambda *_: [torch.zeros(one.shape, dtype=one.dtype) if isinstance(one, Tensor) else one for one in made]
        )

    x = torch.zeros(70, 384, requires_grad=True)
    backend = aot_autograd(fw_compiler=compiler, partition_fn=min_cut_rematerialization_partition)  # inductor's
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        y = torch.compile(layer, backend=backend, fullgraph=True)(x)
    y.sum().backward()
    torch._dynamo.reset()
    assert y.dtype == (torch.bfloat16 if half else torch.float32)
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert [sum("triton_kernel_wrapper" in node for node in nodes) for nodes in graphs] == [1, 3]


def masked(shape: tuple[int, int], **settings: Any) -> nn.Linear:
    """A linear layer [outputs, inputs] under a pattern's mask, weights drawn everywhere else."""
    layer = nn.Linear(shape[1], shape[0])
    optimizer = torch.optim.SGD(layer.parameters())
    SparseEngine(layer, optimizer, method="static", allocation="uniform", **{"sparsity": 0.8} | settings)
    return layer


@pytest.mark.parametrize("shape", [(192, 320), (320, 192)])
def test_blocks_are_found(shape: tuple[int, int]) -> None:
    product = product_of(masked(shape, pattern="block", block=64))
    assert isinstance(product, BlockProduct)
    assert product.values.shape == (3, 64, 64)


def test_smaller_blocks_are_found() -> None:
    product = product_of(masked((320, 352), pattern="block", block=32, sparsity=0.95))
    assert isinstance(product, BlockProduct)
    assert product.values.shape == (round(0.05 * 110), 32, 32)


def test_blocks_that_would_take_longer_stay_dense() -> None:
    """On an H200: .76 to 1.03 times as fast, half or a third of blocks of 64 left; .5 with a tenth of those of 16."""
    few = [
        masked((640, 640), pattern="block", block=edge, sparsity=s) for edge, s in ((64, 0.7), (32, 0.85), (16, 0.9))
    ]
    assert [product_of(layer) for layer in few] == ["its zeros are in no blocks that save time"] * 3


def test_two_of_four_is_told_from_its_weights() -> None:
    layer = masked((32, 64), pattern="nm", sparsity=0.5)
    assert _cuda_products.is_two_of_four(layer.weight)
    assert not _cuda_products.is_two_of_four(masked((32, 64), sparsity=0.5).weight)
    with torch.no_grad():
        layer.weight[3, 4:8] = torch.tensor([1.0, 0.0, 2.0, 3.0])
    assert not _cuda_products.is_two_of_four(layer.weight)
    assert product_of(layer) == "its zeros are in no blocks that save time"


def test_what_two_of_four_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = masked((32, 64), pattern="nm", sparsity=0.5)
    assert product_of(layer) == (
        "2:4 is for bfloat16 and float16 (evaluate.precision: bf16), the model computes float32"
    )
    assert product_of(masked((24, 64), pattern="nm", sparsity=0.5).half()) == (
        "2:4 takes multiples of 16 outputs and inputs, not 24 x 64"
    )
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert product_of(layer.bfloat16()) == "2:4 needs a PyTorch with cuSPARSELt"
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert product_of(layer) == "2:4 needs compute capability 8.0, the GPU has 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert product_of(layer) == "2:4 is slower than all weights at 32 x 64 on compute capability 9.0"


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_two_of_four_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    layer = masked((96, 64), pattern="nm", sparsity=0.5).cuda().bfloat16()
    x = torch.randn(3, 50, 64, device="cuda", dtype=torch.bfloat16)
    product = _cuda_products.TwoOfFourProduct(layer)  # which a small layer on Hopper is not given
    torch.testing.assert_close(product(x), layer(x), rtol=0, atol=3e-2)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (masked((64, 64)), "its zeros are in no blocks that save time"),
        (masked((64, 64), pattern="block", block=4), "its zeros are in no blocks that save time"),
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
    with pytest.raises(
        UsageError, match="no layer here: 2 layers: its zeros are in no blocks that save time; 1 layers: 2:4 is"
    ):
        _cuda_products.with_sparse_products(model)


def test_a_dense_model_and_one_with_some_patterns_are_not() -> None:
    assert isinstance(_cuda_products.with_sparse_products(nn.Sequential(nn.Linear(4, 4)))[0], nn.Linear)  # type: ignore[index]
    blocked = masked((192, 320), pattern="block", block=64)
    fast = _cuda_products.with_sparse_products(
        nn.Sequential(masked((64, 64)), masked((64, 64), pattern="diagonal"), blocked)
    )
    assert [type(module) for module in fast.children()] == [nn.Linear, nn.Linear, BlockProduct]


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "raysparse.models._triton_products", raising=False)
    with pytest.raises(UsageError, match=r"kernels need triton, .*: pip install triton"):
        _cuda_products.with_sparse_products(nn.Sequential(masked((192, 320), pattern="block", block=64)))


def test_dead_units_go() -> None:
    model = uvit.build(uvit.Config(sample_size=8, embed_dim=256, depth=2, num_heads=4), seed=0)
    settings = {"sparsity": 0.8, "allocation": "uniform", "pattern": "block", "block": 64}
    SparseEngine(model, torch.optim.SGD(model.parameters()), method="static", **settings)
    with torch.no_grad():
        model.middle.fc1.weight[:64] = 0
        model.middle.fc2.weight[:, :64] = 0
    fast = _cuda_products.with_sparse_products(model)
    assert isinstance(fast, uvit.UViT)
    first = fast.middle.fc1
    assert isinstance(first, nn.Linear | BlockProduct)
    assert len(first.bias) < 1024


def test_units_that_go_are_enough() -> None:
    """RigL gathers the blocks that are left in few units, whose layers are then too full to skip any."""
    model = uvit.build(uvit.Config(sample_size=8, embed_dim=128, depth=2, num_heads=2), seed=0)
    with torch.no_grad():
        for block in (*model.early, model.middle, *model.late):
            block.fc1.weight[128:] = 0
            block.fc1.weight[:64, 64:] = block.fc1.weight[64:128, :64] = 0  # half of what stays
        model.decoder.weight[:, ::2] = 0  # zeros in no blocks
    fast = _cuda_products.with_sparse_products(model)
    assert isinstance(fast, uvit.UViT)
    assert not any(isinstance(module, BlockProduct) for module in fast.modules())
    assert fast.middle.fc1.weight.shape == (128, 128)


@pytest.mark.parametrize("name", ["uvit", "ddpm_unet", "latent_unet"])
def test_models_of_pictures_take_these_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda_products, "with_sparse_products", lambda model: ["taken", model])
    model = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device("cuda"))]))
    assert plugins.load("models", name).sparse_runtime(model) == ["taken", model]
