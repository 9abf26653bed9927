"""Linear layers and convolutions of kernel 1 in training on a CUDA device by kernels that leave out blocks of zeros.

Forward and backward are those of the layers, to rounding, but the gradient of a weight outside the blocks is 0. The
weights are read where they are, so nothing is laid out at a step; blocks are written in place as masks change, and have
room for as many as there may be: a compiled step stays what it is.

On an H200 a step of U-ViT small/2 (128 pictures, bfloat16, compiled, CUDA graphs) takes 30.0 ms dense and 22.6 with a
tenth of blocks of 64 left. The products and GELU are 9.5 of those; dense they are 16.1. It took three things beside
fast products: no kernel starts by itself (CUDA graphs; 28 to 34 ms without), GELU is computed where the MLP's products
are, and what a kernel reads is written once (`_triton_products._in_memory`).
"""

# No `from __future__ import annotations`: PyTorch reads the types of operators.
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from raysparse.models import _cuda_products as products


class BlockLayer(nn.Module):
    """forward(x) as the layer that it stands for, whose parameters it trains, in autocast's type where it is on."""

    rows: Tensor
    columns: Tensor
    starts: Tensor
    turned_columns: Tensor
    turned_starts: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        self.blocked = False  # whether its mask is of blocks; else the layer itself is called
        self.edge = 0

    def lay_out(self, mask: Tensor, edge: int | None, count: int) -> None:
        """Take over the mask, bool, of the weight's shape; of so many blocks of that edge, if of any."""
        self.blocked = edge is not None
        if edge is None:
            return
        used = products.blocks(mask.flatten(1), edge)
        rows, columns = _true_places(used, count)
        for name, values, room in (
            ("rows", rows, used.numel()),
            ("columns", columns, used.numel()),
            ("starts", products.starts(used.sum(1)), len(used) + 1),
            ("turned_columns", _true_places(used.T, count)[1], used.numel()),
            ("turned_starts", products.starts(used.sum(0)), used.shape[1] + 1),
        ):
            if edge != self.edge:
                self.register_buffer(name, values.new_zeros(room), persistent=False)
            getattr(self, name)[: len(values)].copy_(values)
        self.edge = edge

    @property
    def places(self) -> list[Tensor]:
        """Where its blocks lie, as the operators take it."""
        return [self.rows, self.columns, self.starts, self.turned_columns, self.turned_starts]

    def values(self, dtype: torch.dtype) -> Tensor:
        """[outputs, inputs], contiguous: its weight as the kernels read it."""
        return self.layer.weight.detach().flatten(1).to(dtype).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        if not self.blocked:
            return cast(Tensor, self.layer(x))
        weight, pixels = self.layer.weight.flatten(1), isinstance(self.layer, nn.Conv2d)
        dtype = products.compute_type(weight)
        with torch.autocast(x.device.type, enabled=False):
            x = (x.movedim(1, -1) if pixels else x).to(dtype)
            rows = x.reshape(-1, weight.shape[1]).contiguous()
            y = _product(rows, weight, self.values(dtype), self.layer.bias, self.places, self.edge)
            y = y.view(*x.shape[:-1], len(weight))
            return cast(Tensor, y.movedim(-1, 1) if pixels else y)


class BlockMlp(nn.Module):
    """Two linear layers with the exact GELU between them, which is computed where their products are, both ways.

    By itself it took 5.2 ms of 26.1 of a step of U-ViT small/2 (S = .9), more than all of the products of weights with
    activations (4.4): it reads and writes the widest activations that there are.
    """

    def __init__(self, first: BlockLayer, second: BlockLayer) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.first.layer, self.second.layer
        if not (self.first.blocked and self.second.blocked):
            return cast(Tensor, self.second(nn.functional.gelu(self.first(x))))
        dtype = products.compute_type(first.weight)
        with torch.autocast(x.device.type, enabled=False):
            y, _, _ = _mlp(
                x.to(dtype).reshape(-1, first.weight.shape[1]).contiguous(),
                *([first.weight, first.bias, second.weight, second.bias],),
                *([self.first.values(dtype), self.second.values(dtype)],),
                *(self.first.places, self.second.places, [self.first.edge, self.second.edge]),
            )
            return cast(Tensor, y.view(*x.shape[:-1], len(second.weight)))


def with_mlps(owner: nn.Module) -> None:
    """Let one module stand for an MLP whose layers are both by blocks, in place: owner.mlp names its parts."""
    if (names := getattr(owner, "mlp", None)) is None:
        return
    first, activation, second = (getattr(owner, name) for name in names)
    layers = isinstance(first, BlockLayer) and isinstance(second, BlockLayer)
    if layers and products.exact_gelu(activation) and None not in (first.layer.bias, second.layer.bias):
        for name, module in zip(names, (BlockMlp(first, second), nn.Identity(), nn.Identity()), strict=True):
            setattr(owner, name, module)


def lay_out_all(masks: Mapping[BlockLayer, Tensor]) -> None:
    """Let each layer take over its mask. The host waits for the device once: a wait for each of U-ViT's 52 layers would
    let the device stand still as often.
    """
    if not masks:
        return
    counts = torch.stack([_counts(mask.flatten(1)) for mask in masks.values()]).tolist()
    for (layer, mask), (active, *used) in zip(masks.items(), counts, strict=True):
        edge = _edge(mask.numel(), active, used)
        layer.lay_out(mask, edge, active // edge**2 if edge else 0)


def _counts(mask: Tensor) -> Tensor:
    """int64 [1 + edges]: active weights, then the blocks of each edge that hold some; -1 where it does not divide."""
    never = mask.new_full((), -1, dtype=torch.int64)
    fits = [not any(side % edge for side in mask.shape) for edge in products.EDGES]
    used = [products.blocks(mask, edge).sum() if fit else never for edge, fit in zip(products.EDGES, fits, strict=True)]
    return torch.stack([mask.sum(), *used])


def _edge(weights: int, active: int, used: Sequence[int]) -> int | None:
    """Of the blocks that a mask is made of, not only covered by, where so few pay.

    It depends on their number, not on where they lie. What covers blocks of 16 at S = .975 does: a compiled step would
    be compiled anew by updates of the topology.
    """
    for (edge, most), count in zip(products.EDGES.items(), used, strict=True):
        if count * edge**2 == active:
            return edge if active <= most * weights else None
    return None


def _true_places(flags: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rows and columns, int32, of what is true in a bool [rows, columns], row by row. To sort is not to wait for the
    number, as nonzero does; stable, so the same on each device.
    """
    order = flags.flatten().byte().argsort(descending=True, stable=True)[:count].int()
    return order // flags.shape[1], order % flags.shape[1]


@torch.library.triton_op("raysparse::block_product", mutates_args=())
def _product(x: Tensor, weight: Tensor, values: Tensor, bias: Tensor | None, places: list[Tensor], edge: int) -> Tensor:
    """x [tokens, inputs] W^T + b -> [tokens, outputs] of x's type; all contiguous.

    values are what is read: the weight in x's type. The gradient is the weight's, whose sums are not rounded to it.
    """
    onward, _ = _blocks(places, edge)
    return cast(Tensor, products.kernels().block_of_weight(x, values, onward, bias, turned=False, tf32=_tf32()))


@torch.library.triton_op("raysparse::block_product_back", mutates_args=())
def _back(dy: Tensor, x: Tensor, values: Tensor, places: list[Tensor], edge: int) -> tuple[Tensor, Tensor]:
    """dL/dx of x's type, dL/dW float32."""
    kernels, (onward, turned) = products.kernels(), _blocks(places, edge)
    d_x = kernels.block_of_weight(dy, values, turned, None, turned=True, tf32=_tf32())
    return d_x, kernels.block_gradient(x, dy, places[0], onward, _tf32())


@torch.library.triton_op("raysparse::block_mlp", mutates_args=())
def _mlp(
    x: Tensor,
    parameters: list[Tensor],
    values: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    edges: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """gelu(x W^T + b) V^T + c, and for the way back gelu's derivative and what it makes. parameters: W, b, V, c."""
    kernels, (into, _), (out, _) = products.kernels(), _blocks(first, edges[0]), _blocks(second, edges[1])
    after, slopes = kernels.into_gelu(x, values[0], into, parameters[1], _tf32())
    y = kernels.block_of_weight(after, values[1], out, parameters[3], turned=False, tf32=_tf32())
    return y, slopes, after


@torch.library.triton_op("raysparse::block_mlp_back", mutates_args=())
def _mlp_back(
    dy: Tensor,
    x: Tensor,
    slopes: Tensor,
    after: Tensor,
    values: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    edges: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dL/dx of x's type; dL/dW, dL/db, dL/dV float32."""
    kernels, tf32 = products.kernels(), _tf32()
    (into, into_turned), (out, out_turned) = _blocks(first, edges[0]), _blocks(second, edges[1])
    d_before, d_bias = kernels.from_gelu(dy, values[1], out_turned, slopes, tf32)
    d_x = kernels.block_of_weight(d_before, values[0], into_turned, None, turned=True, tf32=tf32)
    d_weight = kernels.block_gradient(x, d_before, first[0], into, tf32)
    return d_x, d_weight, d_bias, kernels.block_gradient(after, dy, second[0], out, tf32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, values, bias, places, edge = inputs
    ctx.save_for_backward(x, values, *places)
    ctx.edge, ctx.dtype = edge, weight.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, values, *places = ctx.saved_tensors
    d_x, d_weight = _back(dy.contiguous(), x, values, places, ctx.edge)
    d_bias = None if ctx.bias_dtype is None else dy.sum(0, dtype=ctx.bias_dtype)
    return d_x, d_weight.to(ctx.dtype), None, d_bias, [None] * len(places), None


_product.register_autograd(_gradients, setup_context=_keep)


def _keep_mlp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, parameters, values, first, second, edges = inputs
    ctx.save_for_backward(x, *output[1:], *values, *first, *second)
    ctx.edges, ctx.dtypes = edges, [parameter.dtype for parameter in parameters]


def _mlp_gradients(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    x, slopes, after, value, other, *places = ctx.saved_tensors
    half = len(places) // 2
    first, second = places[:half], places[half:]
    given = (dy.contiguous(), x, slopes, after, [value, other], first, second, ctx.edges)
    d_x, *found = _mlp_back(*given)
    found.append(dy.sum(0, dtype=ctx.dtypes[3]))
    d_parameters = [gradient.to(dtype) for gradient, dtype in zip(found, ctx.dtypes, strict=True)]
    return d_x, d_parameters, [None] * 2, [None] * half, [None] * half, None


_mlp.register_autograd(_mlp_gradients, setup_context=_keep_mlp)


def _blocks(places: list[Tensor], edge: int) -> tuple[Any, Any]:
    """Of the weight and of its transpose."""
    _, columns, starts, turned_columns, turned_starts = places
    kernels = products.kernels()
    return kernels.Blocks(columns, starts, edge), kernels.Blocks(turned_columns, turned_starts, edge)


def _tf32() -> bool:
    return torch.get_float32_matmul_precision() != "highest"
