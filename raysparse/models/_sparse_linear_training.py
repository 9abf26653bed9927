"""Linear layers in training on a CPU through compiled kernels that touch the active weights only.

Forward and backward are those of the layers, to rounding, but the gradient of a weight outside its mask is 0: a step
whose dense gradients are needed (RigL's growth) is one for the model itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from raysparse.models import _sparse_products as products
from raysparse.models._sparse_memory import Memory

# As in _sparse_products, of a step's three products. 512 x 1,536 at density .5, .35, .25, .1 is .94, 1.3, 1.8, 3.1
# times faster, 512 x 512 .95, 1.3, 1.7, 3.2 times, 96 x 288 .83, 1.06, 1.4, 1.9 times.
_ACTIVE, _LAID_OUT = 1.7, 40


class SparseStep(nn.Module):
    """forward as the model's, with gradients for the model's parameters: linear layers under masks use the kernels.

    masks: of its weights by name, as a SparseEngine has them; what lies outside is taken for 0. `follow` after a change
    of the masks. Runs on torch.get_num_threads() threads; what comes out does not depend on how many.

    UsageError: not float32 on the CPU, or no compiler (see `native.load`).
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        super().__init__()
        products.check(model)
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self._network = [copy.deepcopy(model, shared)]  # its modules are new, its parameters the model's
        self._layers: dict[str, SparseLinear] = {}
        memory = Memory()
        for owner_name, owner in list(self._network[0].named_modules()):
            for name, layer in owner.named_children():
                weight = f"{owner_name}.{name}.weight".lstrip(".")
                if type(layer) is nn.Linear and weight in masks:
                    self._layers[weight] = SparseLinear(layer, memory)
                    setattr(owner, name, self._layers[weight])
        self._masks: dict[str, Tensor] = {}
        self.follow(masks)

    def follow(self, masks: Mapping[str, Tensor]) -> None:
        """Take over new masks; nothing is done where they are those it has (the same tensors)."""
        for name, layer in self._layers.items():
            if masks[name] is not self._masks.get(name):
                layer.lay_out(masks[name])
        self._masks = dict(masks)

    @property
    def pays(self) -> bool:
        """Whether it is faster than the model, by what was measured: where one layer is."""
        return any(layer.pays for layer in self._layers.values())

    def forward(self, x: Tensor, timesteps: Tensor, **cond: Tensor) -> Tensor:
        return cast(Tensor, self._network[0](x, timesteps, **cond))


class SparseLinear(nn.Module):
    """forward(x float32 [..., inputs]) as the nn.Linear it stands for, whose parameters it trains."""

    def __init__(self, layer: nn.Linear, memory: Memory) -> None:
        super().__init__()
        self.layer = layer
        self.pays = False
        self.kernel = products.Kernel(layer.in_features, layer.out_features, memory)
        self.turned = products.Kernel(layer.out_features, layer.in_features, memory)  # dx is a product with W^T

    def lay_out(self, mask: Tensor) -> None:
        """Take over the mask, bool [outputs, inputs]."""
        active = int(mask.count_nonzero())
        self.pays = _ACTIVE * active + _LAID_OUT * sum(mask.shape) < mask.numel()
        if self.pays:
            places = torch.arange(mask.numel()).view(mask.shape)
            self.kernel.lay_out(mask, places)
            self.turned.lay_out(mask.T, places.T)

    def forward(self, x: Tensor) -> Tensor:
        if not self.pays or not products.worth_it(x.numel() // x.shape[-1], self.layer.weight):
            return cast(Tensor, self.layer(x))
        with torch.autocast("cpu", enabled=False):
            return cast(Tensor, _Product.apply(x.float(), self.layer.weight, self.layer.bias, self))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, linear: SparseLinear) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.linear, ctx.has_bias = linear, bias is not None
        return linear.kernel.linear(x, linear.kernel.values(weight), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (x, weight), linear = ctx.saved_tensors, ctx.linear
        dy = grad_outputs[0].float().contiguous()
        dx = linear.turned.linear(dy, linear.turned.values(weight), None) if ctx.needs_input_grad[0] else None
        d_weight = linear.kernel.gradients(x, dy) if ctx.needs_input_grad[1] else None
        d_bias = dy.flatten(0, -2).sum(0) if ctx.has_bias else None
        return dx, d_weight, d_bias, None
