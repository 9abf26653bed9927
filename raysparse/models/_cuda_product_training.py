"""Linear layers and convolutions of kernel 1 in training on a CUDA device by kernels that leave out blocks of zeros.

Forward and backward are those of the layers, to rounding, but the gradient of a weight outside the blocks is 0. The
weights are read where they are, so nothing is laid out at a step; blocks are written in place as masks change, and have
room for as many as there may be: a compiled step stays what it is.

On an H200 the three products of a layer by themselves are 1.15 to 1.7 times as fast with a tenth of blocks of 64 left
(32,896 tokens, 512 to 2,048 features), but a whole compiled step of U-ViT small/2 took 39.6 ms where the dense one took
30.9; why is not known yet. So `auto` does not choose them.
"""

# No `from __future__ import annotations`: PyTorch reads the types of operators.
from typing import Any, cast

import torch
from torch import Tensor, nn

from raysparse.models import _cuda_products as products


class BlockLayer(nn.Module):
    """forward(x) as the layer that it stands for, whose parameters it trains, in autocast's type where it is on."""

    columns: Tensor
    starts: Tensor
    rows: Tensor
    turned_columns: Tensor
    turned_starts: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        self.blocked = False  # whether its mask is of blocks; else the layer itself is called
        self.edge = 0

    def lay_out(self, mask: Tensor) -> None:
        """Take over the mask, bool, of the weight's shape."""
        edge = _edge(mask.flatten(1))
        self.blocked = edge is not None
        if edge is None:
            return
        used = products.blocks(mask.flatten(1), edge)
        places, turned = used.nonzero().int(), used.T.nonzero().int()
        for name, values, room in (
            ("rows", places[:, 0], used.numel()),
            ("columns", places[:, 1], used.numel()),
            ("starts", products.starts(used.sum(1)), len(used) + 1),
            ("turned_columns", turned[:, 1], used.numel()),
            ("turned_starts", products.starts(used.sum(0)), used.shape[1] + 1),
        ):
            if edge != self.edge:
                self.register_buffer(name, values.new_zeros(room), persistent=False)
            getattr(self, name)[: len(values)].copy_(values)
        self.edge = edge

    def forward(self, x: Tensor) -> Tensor:
        if not self.blocked:
            return cast(Tensor, self.layer(x))
        weight, bias = self.layer.weight.flatten(1), self.layer.bias
        dtype, pixels = products.compute_type(weight), isinstance(self.layer, nn.Conv2d)
        with torch.autocast(x.device.type, enabled=False):
            x = (x.movedim(1, -1) if pixels else x).to(dtype)
            y = _product(
                *(x.reshape(-1, weight.shape[1]).contiguous(), weight, weight.detach().to(dtype).contiguous()),
                *(bias, self.rows, self.columns, self.starts, self.turned_columns, self.turned_starts, self.edge),
            ).view(*x.shape[:-1], len(weight))
            return cast(Tensor, y.movedim(-1, 1) if pixels else y)


def _edge(mask: Tensor) -> int | None:
    """Of the blocks that the mask is made of, not only covered by, where so few pay.

    It depends on their number, not on where they lie. What covers blocks of 16 at S = .975 does: a compiled step would
    be compiled anew by updates of the topology.
    """
    for edge, most in products.EDGES.items():
        if not any(side % edge for side in mask.shape):
            used, active = int(products.blocks(mask, edge).sum()) * edge**2, int(mask.sum())
            if used == active:
                return edge if active <= most * mask.numel() else None
    return None


@torch.library.triton_op("raysparse::block_product", mutates_args=())
def _product(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    starts: Tensor,
    turned_columns: Tensor,
    turned_starts: Tensor,
    edge: int,
) -> Tensor:
    """x [tokens, inputs] W^T + b -> [tokens, outputs] of x's type; all contiguous.

    values are what is read: the weight in x's type. The gradient is the weight's, whose sums are not rounded to it.
    """
    kernels = products.kernels()
    blocks = kernels.Blocks(columns, starts, edge)
    return cast(Tensor, kernels.block_of_weight(x, values, blocks, bias, turned=False, tf32=_tf32()))


@torch.library.triton_op("raysparse::block_product_back", mutates_args=())
def _back(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    rows: Tensor,
    columns: Tensor,
    starts: Tensor,
    turned_columns: Tensor,
    turned_starts: Tensor,
    edge: int,
) -> tuple[Tensor, Tensor]:
    """dL/dx of x's type, dL/dW float32."""
    kernels = products.kernels()
    turned = kernels.Blocks(turned_columns, turned_starts, edge)
    d_x = kernels.block_of_weight(dy, values, turned, None, turned=True, tf32=_tf32())
    return d_x, kernels.block_gradient(x, dy, rows, kernels.Blocks(columns, starts, edge), _tf32())


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, values, bias, *blocks, edge = inputs
    ctx.save_for_backward(x, values, *blocks)
    ctx.edge, ctx.dtype = edge, weight.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    d_x, d_weight = _back(dy.contiguous(), *ctx.saved_tensors, ctx.edge)
    d_bias = None if ctx.bias_dtype is None else dy.sum(0, dtype=ctx.bias_dtype)
    return d_x, d_weight.to(ctx.dtype), None, d_bias, *[None] * 6


_product.register_autograd(_gradients, setup_context=_keep)


def _tf32() -> bool:
    return torch.get_float32_matmul_precision() != "highest"
