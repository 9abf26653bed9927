"""Dense weights under a mask: the forward pass sees masked weights, the optimizer moves all of them.

Between two steps a parameter holds its masked values, exact zeros outside the mask, so that whatever reads it (forward,
evaluation, a checkpoint, an export) sees the sparse model. What the mask hides lies beside it, zero where the mask is
1, and comes back for the optimizer step. Both are disjoint, so one bitwise or is the dense weight again, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from raysparse.errors import UsageError
from raysparse.sparse.masks import SIGNED, zero_outside


class Hidden:
    """What a mask hides of one set of tensors: a model's weights, or their moving average."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}  # by parameter name; zero where the tensor itself is

    @torch.no_grad()
    def hide(self, tensors: Mapping[str, Tensor], bits: Mapping[str, Tensor]) -> None:
        """Zero dense tensors in place outside their masks, and keep what was there. bits: masks.all_bits."""
        for name, kept in bits.items():
            tensor = tensors[name].detach()
            if name in self.values:
                self.values[name].copy_(tensor)
            else:
                self.values[name] = tensor.clone()
            zero_outside(self.values[name], kept.bitwise_not())
            zero_outside(tensor, kept)

    @torch.no_grad()
    def show(self, tensors: Mapping[str, Tensor]) -> None:
        """The dense values back, in place."""
        for name, hidden in self.values.items():
            whole = SIGNED[hidden.element_size()]
            tensors[name].detach().view(whole).bitwise_or_(hidden.view(whole))

    def copy(self) -> Hidden:
        copied = Hidden()
        copied.values = {name: value.clone() for name, value in self.values.items()}
        return copied

    def state_dict(self) -> dict[str, Tensor]:
        return self.copy().values

    def load_state_dict(self, state: Mapping[str, Any], like: Mapping[str, Tensor]) -> None:
        """UsageError where it is of other tensors."""
        if state.keys() != like.keys() or any(state[name].shape != tensor.shape for name, tensor in like.items()):
            raise UsageError("the saved hidden weights belong to another model.")
        self.values = {name: torch.empty_like(like[name]).copy_(value).detach() for name, value in state.items()}
