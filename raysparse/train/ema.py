"""The moving average of the weights that evaluation and sampling use."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Ema:
    """A copy of a model whose weights follow the trained ones: shadow += (1 - decay) (weight - shadow).

    The decay warms up as min(decay, (1 + n) / (10 + n)) after n updates (PAPER: Latent Diffusion), so that the
    random initial weights are soon forgotten. `model` is in eval mode and takes no gradients; evaluating it leaves
    the trained model alone.

    A pruned weight would fade slowly in the shadow. SparseEngine.after_average therefore zeroes the shadow outside the
    masks after each topology update (`parameters()` gives the tensors by name); between updates both sides are exactly
    0 there and a moving average of zeros is 0.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._source = model
        self._shadow: list[Tensor] = list(self.model.parameters())
        self._weights: list[Tensor] = list(model.parameters())

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Move towards the trained weights; updates: how many moves there have been, this one included (>= 1)."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(self._shadow, self._weights, 1 - decay)

    def parameters(self) -> Mapping[str, Tensor]:
        """The shadow weights by the names that the trained model gives them; write in place."""
        return dict(self.model.named_parameters())

    @torch.no_grad()
    def evaluation_model(self) -> nn.Module:
        """The averaged weights with the trained model's buffers as they are now."""
        for ours, theirs in zip(self.model.buffers(), self._source.buffers(), strict=True):
            ours.copy_(theirs)
        return self.model
