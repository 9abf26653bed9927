"""Linear layers and convolutions of kernel 1 on a CUDA device that leave out zeros in a pattern: for sampling.

2:4 by PyTorch's semi-structured tensors (cuSPARSELt), blocks and diagonals by the kernels of `_triton_products`; which
pattern a layer has is seen from where its zeros lie. A layer that none fits stays dense: convolutions with a kernel,
single zeros, blocks below 16, which a tensor core cannot take.

Nothing of this has been timed: no GPU was at hand. Diagonals are not expected to be faster at S = .9: they take no
tensor core, 15 times as fast on an H200 (bfloat16 against float32), and as blocks of 16 they would be 96 % full.
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

EDGES = (64, 32, 16)
_HALVES = (torch.bfloat16, torch.float16)
_LEFT = 0.75  # a layer of which more would be computed stays dense; not measured
_FIT = 1.1  # a larger block may compute so much more than a smaller one


def with_sparse_products(model: nn.Module) -> nn.Module:
    """A copy of the model, as it is now, whose layers leave out zeros in a pattern; they compute in autocast's type
    where it is on, else in their weights'. Units that the zeros have emptied are removed, as on a CPU.

    UsageError: no triton, or a model with zeros of which none can be left out.
    """
    kernels()
    found = copy.deepcopy(model)
    if (remove := getattr(found, "remove_dead_units", None)) and not any(map(_has_diagonals, found.modules())):
        remove()  # a matrix of diagonals without some of its rows has none
    made, reasons = 0, collections.Counter[str]()
    for owner in list(found.modules()):
        for name, layer in owner.named_children():
            product = product_of(layer)
            if isinstance(product, str):
                reasons[product] += 1
            elif product is not None:
                setattr(owner, name, product)
                made += 1
    if reasons and not made:
        why = "; ".join(f"{count} layers: {reason}" for reason, count in reasons.most_common())
        raise UsageError(
            f"a GPU leaves out zeros as 2:4, blocks of 16 to 64 or diagonals; it can do so in no layer here: {why}"
        )
    return found


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
    if int(layer.weight.count_nonzero()) > _LEFT * layer.weight.numel():
        return None
    if weight is None:
        return "convolutions with a kernel, hooks or groups"
    if edge := block_edge(weight):
        return BlockProduct(layer, edge)
    reason: str | None = "its zeros are single ones"
    if is_two_of_four(weight):  # as few diagonals may be, too
        reason = why_not_two_of_four(layer)
    if reason is None:
        return TwoOfFourProduct(layer)
    return DiagonalProduct(layer) if _share(diagonals(weight)) <= _LEFT else reason


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
    return weight.view(outputs // edge, edge, inputs // edge, edge).ne(0).any(3).any(1)


def block_edge(weight: Tensor) -> int | None:
    """Of the blocks that cover the weight: the largest that computes no more than the others, if any is worth it."""
    sizes = [edge for edge in EDGES if not any(side % edge for side in weight.shape)]
    shares = {edge: _share(blocks(weight, edge)) for edge in sizes}
    fit = [edge for edge in sizes if shares[edge] <= min(_LEFT, _FIT * min(shares.values()))]
    return max(fit, default=None)


def is_two_of_four(weight: Tensor) -> bool:
    """At most two of each four weights in a row are not 0."""
    return weight.shape[1] % 4 == 0 and bool((weight.reshape(-1, 4).count_nonzero(-1) <= 2).all())


def why_not_two_of_four(layer: nn.Linear | nn.Conv2d) -> str | None:
    """Why PyTorch's semi-structured product cannot take a layer whose weights are 2:4; None: it can."""
    outputs, inputs = layer.weight.flatten(1).shape
    if (dtype := compute_type(layer.weight)) not in _HALVES:
        return f"2:4 is for bfloat16 and float16 (train.precision: bf16), the model computes {_name(dtype)}"
    if outputs % 16 or inputs % 16:
        return f"2:4 takes multiples of 16 outputs and inputs, not {outputs} x {inputs}"
    if not torch.backends.cusparselt.is_available():
        return "2:4 needs a PyTorch with cuSPARSELt"
    major, minor = torch.cuda.get_device_capability(layer.weight.device)
    return None if major >= 8 else f"2:4 needs compute capability 8.0, the GPU has {major}.{minor}"


def diagonals(weight: Tensor) -> Tensor:
    """bool [max(outputs, inputs)]: which of its wrapped diagonals hold a weight that is not 0.

    Of a wide matrix, diagonal d is (i, (i + d) mod inputs); of a tall one, the transpose's.
    """
    return _aligned(weight if weight.shape[0] <= weight.shape[1] else weight.T).ne(0).any(0)


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
        self._keep(values=cut[used].contiguous(), columns=used.nonzero()[:, 1].int(), starts=_starts(used.sum(1)))
        self._kernel = kernels().block
        self._tf32 = torch.get_float32_matmul_precision() != "highest"  # asked in forward it would break the graph

    def _product(self, x: Tensor) -> Tensor:
        y: Tensor = self._kernel(x, self.values, self.columns, self.starts, self.bias, self.outputs, self._tf32)
        return y


class DiagonalProduct(_Product):
    """By a kernel that walks the diagonals that hold weights."""

    values: Tensor
    shifts: Tensor
    starts: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__(layer)
        weight, longer = layer.weight.detach().flatten(1).to(self.dtype), max(self.outputs, self.inputs)
        tile = kernels().DIAGONAL_OUTPUTS
        offsets = diagonals(weight).nonzero()[:, 0]
        shifts = offsets if self.outputs <= self.inputs else -offsets % longer
        output = torch.arange(self.outputs, device=weight.device)
        read = (output + shifts[:, None]) % longer  # [diagonals, outputs]: the input
        inside = read < self.inputs
        values = weight[output, read.clamp(max=self.inputs - 1)].masked_fill(~inside, 0)
        tiles = -(-self.outputs // tile)
        values = F.pad(values, (0, -self.outputs % tile)).view(-1, tiles, tile).transpose(0, 1)
        meets = values.ne(0).any(2)
        self._keep(
            values=values[meets].contiguous(),
            shifts=shifts.expand(len(values), -1)[meets].int(),
            starts=_starts(meets.sum(1)),
        )
        self._kernel = kernels().diagonal

    def _product(self, x: Tensor) -> Tensor:
        y: Tensor = self._kernel(x, self.values, self.shifts, self.starts, self.bias, self.outputs)
        return y


def _has_diagonals(layer: nn.Module) -> bool:
    weight = matrix(layer)
    return weight is not None and block_edge(weight) is None and _share(diagonals(weight)) <= _LEFT


def _aligned(wide: Tensor) -> Tensor:
    """[outputs, inputs]: column d is diagonal d."""
    outputs, inputs = wide.shape
    rows, columns = torch.arange(outputs, device=wide.device), torch.arange(inputs, device=wide.device)
    return wide.gather(1, (rows[:, None] + columns) % inputs)


def _starts(counts: Tensor) -> Tensor:
    """int32 [n + 1]: where each of so many begins."""
    return F.pad(counts.cumsum(0), (1, 0)).int()


def _share(used: Tensor) -> float:
    return float(used.float().mean())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
