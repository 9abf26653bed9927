"""Linear layers and convolutions of kernel 1 on a CUDA device that leave out zeros in a pattern: for sampling.

2:4 by PyTorch's semi-structured tensors (cuSPARSELt), blocks by the kernels of `_triton_products`: where a layer's
zeros lie says which. A layer that none fits stays dense, and so does one that an H200 computes as fast with its zeros:
convolutions with a kernel, single zeros, blocks below 32; see `EDGES` and `why_not_two_of_four`.

Diagonals too. A kernel that walked them took 25 to 140 times as long as the dense product in bfloat16 with 2 to 10 % of
them left (512 x 1,536 to 2,048 x 512, 32,896 tokens): it uses no tensor core, and as blocks of 16 they are 96 % full.
"""

from __future__ import annotations

import collections
import copy
import importlib
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raysparse.errors import UsageError

# A block's edge, and the share of blocks up to which leaving out the others is faster, in bfloat16 on an H200. Linear
# layers of 512 to 4,096 features, 32,896 tokens: with .05, .1, .25, .35 of blocks of 64 left 1.8 to 4.1, 1.5 to 2.7,
# 1.04 to 1.27, .95 to 1.02 times as fast as dense; of 32 1.3 to 1.9, 1.01 to 1.15, .45 to .76. Of 16 .5 to .8 with .05
# left: they fill too little of a tensor core, also when four are taken as one of 64 outputs.
EDGES = {64: 0.25, 32: 0.1}
_HALVES = (torch.bfloat16, torch.float16)
_ZEROS = 0.25  # share of zeros below which a layer is a dense one
_FIT = 1.1  # a larger block may compute so much more than a smaller one
# cuSPARSELt on an H200, 32,896 tokens: 512 x 2,048 takes 3 to 7 times as long as the dense product, 1,024 x 4,096 1.2
# times; 8,192 x 8,192 with 8,192 tokens .77. Nothing between was measured. Replayed from a CUDA graph
# (benchmarks/products_gpu.py) 2:4 is 1.06 to 1.22 times as fast as dense at 512 to 2,048 and 1.36 at 1,024 x 4,096; but
# a whole sampling loop, compiled with CUDA graphs, took 2.6 times as long. Why is not known, so the limit stays.
_HOPPER = (9, 0)
_TWO_OF_FOUR_FROM = 8_192


def with_sparse_products(model: nn.Module) -> nn.Module:
    """A copy of the model, as it is now, whose layers leave out zeros in a pattern; they compute in autocast's type
    where it is on, else in their weights'. Units that the zeros have emptied are removed, as on a CPU.

    UsageError: no triton, or a model with zeros of which none can be left out.
    """
    kernels()
    found = copy.deepcopy(model)
    if remove := getattr(found, "remove_dead_units", None):
        remove()
    # Then zeros are left out, though the layers that remain may be too full of blocks: RigL gathers them in few units.
    removed = _size(found) < _size(model)
    made, reasons = 0, collections.Counter[str]()
    for owner in list(found.modules()):
        for name, layer in owner.named_children():
            product = product_of(layer)
            if isinstance(product, str):
                reasons[product] += 1
            elif product is not None:
                setattr(owner, name, product)
                made += 1
        _with_activations(owner)
    if reasons and not (made or removed):
        why = "; ".join(f"{count} layers: {reason}" for reason, count in reasons.most_common())
        raise UsageError(
            f"a GPU leaves out zeros as 2:4 or in blocks of 64 or 32; it can do so in no layer here: {why}"
        )
    return found


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _with_activations(owner: nn.Module) -> None:
    """Let a product apply the exact GELU that alone takes what it makes, in place: owner.mlp names the two."""
    if (names := getattr(owner, "mlp", None)) is None:
        return
    product, activation = getattr(owner, names[0]), getattr(owner, names[1])
    if isinstance(product, BlockProduct) and exact_gelu(activation):
        product.gelu = True
        setattr(owner, names[1], nn.Identity())


def exact_gelu(module: nn.Module) -> bool:
    """Whether it is the GELU that the kernels compute."""
    return type(module) is nn.GELU and module.approximate == "none"


def kernels() -> ModuleType:
    """`_triton_products`. UsageError: without triton."""
    try:
        return importlib.import_module("raysparse.models._triton_products")
    except ImportError as error:
        raise UsageError(
            f"its kernels need triton, which PyTorch for CUDA brings along on Linux: pip install triton ({error})"
        ) from error


def product_of(layer: nn.Module) -> nn.Module | str | None:
    """What stands for a layer, or why nothing does; None: it has no zeros worth it, or is no layer with a weight."""
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        return None
    weight = matrix(layer)
    if int(layer.weight.count_nonzero()) > (1 - _ZEROS) * layer.weight.numel():
        return None
    if weight is None:
        return "convolutions with a kernel, hooks or groups"
    if edge := block_edge(weight):
        return BlockProduct(layer, edge)
    if not is_two_of_four(weight):
        return "its zeros are in no blocks that save time"
    return why_not_two_of_four(layer) or TwoOfFourProduct(layer)


def matrix(layer: nn.Module) -> Tensor | None:
    """[outputs, inputs] of a linear layer or a convolution that is one at each pixel; None for another."""
    if layer._forward_hooks or layer._forward_pre_hooks or type(layer) not in (nn.Linear, nn.Conv2d):
        return None
    if isinstance(layer, nn.Conv2d):
        plain = layer.kernel_size == layer.stride == (1, 1) and layer.padding in ((0, 0), "valid", "same")
        return layer.weight.detach().flatten(1) if plain and layer.groups == 1 else None
    assert isinstance(layer, nn.Linear)
    return layer.weight.detach()


def blocks(weight: Tensor, edge: int) -> Tensor:
    """bool [outputs / edge, inputs / edge]: which blocks hold a weight that is not 0."""
    outputs, inputs = weight.shape
    return weight.reshape(outputs // edge, edge, inputs // edge, edge).ne(0).any(3).any(1)


def block_edge(weight: Tensor) -> int | None:
    """Of the blocks that cover the weight: the largest that computes hardly more than the others, if one saves time."""
    sizes = [edge for edge in EDGES if not any(side % edge for side in weight.shape)]
    shares = {edge: _share(blocks(weight, edge)) for edge in sizes}
    fit = [edge for edge in sizes if shares[edge] <= min(EDGES[edge], _FIT * min(shares.values()))]
    return max(fit, default=None)


def is_two_of_four(weight: Tensor) -> bool:
    """At most two of each four weights in a row are not 0."""
    return weight.shape[1] % 4 == 0 and bool((weight.reshape(-1, 4).count_nonzero(-1) <= 2).all())


def why_not_two_of_four(layer: nn.Linear | nn.Conv2d) -> str | None:
    """Why PyTorch's semi-structured product cannot take a layer whose weights are 2:4; None: it can."""
    outputs, inputs = layer.weight.flatten(1).shape
    if (dtype := compute_type(layer.weight)) not in _HALVES:
        return f"2:4 is for bfloat16 and float16 (evaluate.precision: bf16), the model computes {_name(dtype)}"
    if outputs % 16 or inputs % 16:
        return f"2:4 takes multiples of 16 outputs and inputs, not {outputs} x {inputs}"
    if not torch.backends.cusparselt.is_available():
        return "2:4 needs a PyTorch with cuSPARSELt"
    major, minor = torch.cuda.get_device_capability(layer.weight.device)
    if (major, minor) == _HOPPER and min(outputs, inputs) < _TWO_OF_FOUR_FROM:
        return f"2:4 is slower than all weights at {outputs} x {inputs} on compute capability 9.0"
    return None if major >= 8 else f"2:4 needs compute capability 8.0, the GPU has {major}.{minor}"


def compute_type(weight: Tensor) -> torch.dtype:
    """Autocast's on the weight's device, where it is on, else the weight's."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class _Product(nn.Module):
    """forward(x) as the layer that it stands for, no gradients; x of any floating type, result of `dtype`."""

    bias: Tensor | None

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.dtype = compute_type(layer.weight)
        self.pixels = isinstance(layer, nn.Conv2d)
        self.outputs, self.inputs = layer.weight.flatten(1).shape
        self._keep(bias=None if layer.bias is None else layer.bias.detach().to(self.dtype))

    def _keep(self, **tensors: Tensor | None) -> None:
        """As buffers: a CUDA graph copies no buffer at each replay, but other attributes."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = (x.movedim(1, -1) if self.pixels else x).to(self.dtype)  # no copy in channels_last
            y = self._product(x.reshape(-1, self.inputs).contiguous()).view(*x.shape[:-1], self.outputs)
            return y.movedim(-1, 1) if self.pixels else y

    def _product(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class TwoOfFourProduct(_Product):
    """By PyTorch's semi-structured tensors."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__(layer)
        weight = layer.weight.detach().flatten(1).to(self.dtype).contiguous()
        self.packed = nn.Parameter(torch.sparse.to_sparse_semi_structured(weight), requires_grad=False)

    def _product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.packed, self.bias)


class BlockProduct(_Product):
    """By a kernel that skips blocks of zeros."""

    values: Tensor
    columns: Tensor
    starts: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d, edge: int) -> None:
        super().__init__(layer)
        weight = layer.weight.detach().flatten(1).to(self.dtype)
        used = blocks(weight, edge)
        cut = weight.view(self.outputs // edge, edge, self.inputs // edge, edge).permute(0, 2, 3, 1)
        self._keep(values=cut[used].contiguous(), columns=used.nonzero()[:, 1].int(), starts=starts(used.sum(1)))
        self.edge, self.gelu = edge, False
        self._kernels = kernels()
        self._tf32 = torch.get_float32_matmul_precision() != "highest"  # asked in forward it would break the graph

    def _product(self, x: Tensor) -> Tensor:
        found = self._kernels.Blocks(self.columns, self.starts, self.edge)
        y: Tensor = self._kernels.block(x, self.values, found, self.bias, gelu=self.gelu, tf32=self._tf32)
        return y


def starts(counts: Tensor) -> Tensor:
    """int32 [n + 1]: where each of so many begins."""
    return F.pad(counts.cumsum(0), (1, 0)).int()


def _share(used: Tensor) -> float:
    return float(used.float().mean())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
