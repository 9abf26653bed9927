"""Linear layers and convolutions in training through compiled kernels that touch the active weights only.

Those of this file are for a CPU; on a CUDA device `_cuda_product_training` leaves out blocks.

Forward and backward are those of the layers, to rounding, but the gradient of a weight outside its mask may be 0: a
step whose dense gradients are needed (RigL's growth) is one for the model itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from raysparse.errors import UsageError
from raysparse.models import _cpu, _cuda_products
from raysparse.models import _sparse_pairs as pairs
from raysparse.models import _sparse_products as products
from raysparse.models._cuda_product_training import BlockLayer, lay_out_all, with_mlps
from raysparse.models._sparse_memory import Memory

# As in _sparse_products, of a step's three products, and 1.15 (amd, intel) or 1.25 times what fitted 2,056 tokens:
# weights are gathered and their gradients spread at each step, however few tokens. Times faster at density .5, .35,
# .25, .1: 512 x 1,536 is .78, –, 1.3, 2.28 (intel; with 257 tokens .57, –, .97, 1.68), 1.31, 1.8, 2.35, 4.3 (amd; with
# 514 tokens .99, 1.43, 1.85, 3.4), .94, 1.33, 1.8, 3.1 (narrow; with 257 tokens .78, –, 1.37, 2.5); a 3x3 convolution
# of 256 channels at .35, .25, .1 –, 1.33, 2.2; 1.57, 2.0, 3.0; 1.3, 1.65, 3.2. By blocks of 16 512 x 1,536 is .94, –,
# 1.6, 2.7 (intel), 1.3, 1.87, 2.5, 4.6 (amd), 1.17, 1.6, 2.1, 4.1 (narrow).
_BY_CPU = {
    "intel": products.Costs(3.0, 2.5, 20),
    "amd": products.Costs(1.9, 1.65, 14),
    "narrow": products.Costs(2.5, 1.85, 14),
}
_COSTS = _BY_CPU[_cpu.KIND]
# In bfloat16, on the EPYC: of a pair in two of the products, of a weight in that for gradients. Times faster than dense
# in bfloat16 at density .5, .35, .25, .1, single weights; blocks: 512 x 1,536 .73, .97, 1.2, 2.2; 1.0, 1.5, 1.9, 3.4; a
# 3x3 convolution of 256 channels .75, .97, 1.25, 2.3.
_PAIRS, _OF_PAIRS = products.Costs(0.95, 0.66, 28), 0.5


class SparseStep(nn.Module):
    """forward as the model's, with gradients for the model's parameters: layers under masks use the kernels.

    masks: of its weights by name, as a SparseEngine has them; what lies outside is taken for 0. `follow` after a change
    of the masks. Runs on torch.get_num_threads() threads; what comes out does not depend on how many.

    UsageError: not float32 on the CPU, or no compiler (see `native.load`); on a CUDA device no triton, or no layer
    whose mask is of blocks that save time.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        super().__init__()
        cuda = _on_cuda(model)
        if cuda:
            _cuda_products.kernels()
        else:
            products.check(model)
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self._network = [copy.deepcopy(model, shared)]  # its modules are new, its parameters the model's
        self._layers: dict[str, SparseLayer | BlockLayer] = {}
        memory = Memory()
        for owner_name, owner in list(self._network[0].named_modules()):
            for name, layer in owner.named_children():
                weight = f"{owner_name}.{name}.weight".lstrip(".")
                if weight in masks and products.supported(layer) and getattr(layer, "stride", (1, 1)) == (1, 1):
                    if not cuda:
                        self._layers[weight] = SparseLayer(layer, memory)
                    elif _cuda_products.matrix(layer) is not None:
                        self._layers[weight] = BlockLayer(layer)
                    else:
                        continue
                    setattr(owner, name, self._layers[weight])
            with_mlps(owner)
        self._masks: dict[str, Tensor] = {}
        self.follow(masks)
        if cuda and not any(getattr(layer, "blocked", False) for layer in self._layers.values()):
            raise UsageError(
                "a GPU leaves out zeros in blocks of 64 or 32 in training, at most a quarter or a tenth of them left "
                "(sparse.pattern: block, sparse.block: 64); no layer here has such a mask"
            )

    def follow(self, masks: Mapping[str, Tensor]) -> None:
        """Take over new masks; nothing is done where they are those it has (the same tensors)."""
        changed = {
            layer: masks[name] for name, layer in self._layers.items() if masks[name] is not self._masks.get(name)
        }
        lay_out_all({layer: mask for layer, mask in changed.items() if isinstance(layer, BlockLayer)})
        for layer, mask in changed.items():
            if isinstance(layer, SparseLayer):
                layer.lay_out(mask)
        self._masks = dict(masks)

    def pays_for(self, examples: int) -> bool:
        """Whether it is faster than the model, by what was measured: on a CPU where one layer is, which goes by what it
        is given at each call; on CUDA, compiled and in bfloat16, where most of the weights under masks lie in layers by
        blocks.
        """
        layers = self._layers.values()
        blocked = (layer.layer.weight for layer in layers if isinstance(layer, BlockLayer) and layer.blocked)
        most = 2 * sum(weight.numel() for weight in blocked) > sum(mask.numel() for mask in self._masks.values())
        return most or any(isinstance(layer, SparseLayer) and layer.pays for layer in layers)

    def forward(self, x: Tensor, timesteps: Tensor, **cond: Tensor) -> Tensor:
        return cast(Tensor, self._network[0](x, timesteps, **cond))


def _on_cuda(model: nn.Module) -> bool:
    return next(model.parameters()).device.type == "cuda"


class SparseLayer(nn.Module):
    """forward(x) as the nn.Linear, or nn.Conv2d of stride 1, that it stands for, whose parameters it trains."""

    def __init__(self, layer: nn.Module, memory: Memory) -> None:
        super().__init__()
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        self.layer = layer
        self.pays = False
        self.dense_speed = _cpu.dense_speed()  # of the autocast that it is made under
        self.window = products.Window.of_layer(layer) if isinstance(layer, nn.Conv2d) else None
        self.in_pairs = pairs.used(layer.weight)
        shape = layer.weight.shape
        self.kernel = products.Kernel(shape, memory, in_pairs=self.in_pairs)
        self.turned = products.Kernel(shape, memory, turned=True, in_pairs=self.in_pairs)
        self.summing = products.Kernel(shape, memory) if self.in_pairs else self.kernel

    @property
    def weight(self) -> Tensor:
        """Of the layer it stands for."""
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    def lay_out(self, mask: Tensor) -> None:
        """Take over the mask, bool, of the weight's shape."""
        self.kernel.count(mask)
        self.pays = self._cost(mask) * self.dense_speed < mask.numel()
        if self.pays:
            self.kernel.lay_out()
            for kernel in (self.turned, self.summing):
                if kernel is not self.kernel:
                    kernel.count(mask)
                    kernel.lay_out()

    def _cost(self, mask: Tensor) -> float:
        if not self.in_pairs:
            return _COSTS.of(self.kernel)
        return _PAIRS.of(self.kernel) + _OF_PAIRS * int(mask.count_nonzero())

    def forward(self, x: Tensor) -> Tensor:
        if not self.pays or not products.worth_it(self.layer, x):
            return cast(Tensor, self.layer(x))
        with torch.autocast("cpu", enabled=False):
            x = x.bfloat16() if self.in_pairs else x.float()
            return cast(Tensor, _Product.apply(x, self.layer.weight, self.layer.bias, self))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: SparseLayer) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.has_bias = layer, bias is not None
        values = layer.kernel.values(weight)
        if layer.window:
            return layer.kernel.convolve(x, values, bias, layer.window)
        return layer.kernel.linear(x, values, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (x, weight), layer = ctx.saved_tensors, ctx.layer
        dy, window, dx, d_weight = grad_outputs[0].to(x.dtype).contiguous(), layer.window, None, None
        if ctx.needs_input_grad[0]:
            values = layer.turned.values(weight)
            dx = (
                layer.turned.convolve(dy, values, None, _back(window))
                if window
                else layer.turned.linear(dy, values, None)
            )
        if ctx.needs_input_grad[1]:
            d_weight = (
                layer.summing.convolve_gradients(x, dy, window)
                if window
                else layer.summing.linear_gradients(x.contiguous(), dy)
            )
        columns = tuple(axis for axis in range(dy.dim()) if axis != (1 if window else dy.dim() - 1))
        return dx, d_weight, dy.sum(columns, dtype=torch.float32) if ctx.has_bias else None, None


def _back(window: products.Window) -> products.Window:
    """The window with which dx is made from dy, of a convolution of stride 1."""
    return window._replace(padding=tuple(size - 1 - by for size, by in zip(window.kernel, window.padding, strict=True)))
