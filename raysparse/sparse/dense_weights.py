"""How a method with dense weights under its masks (METHOD.straight_through) goes through a step; SparseEngine calls it.

mask_gradients   the dense weights come back; dL/dw += λ (1 - m) w; all of them take the optimizer step
after_step       new masks by magnitude where they are due; the weights are hidden outside them again
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raysparse import plugins
from raysparse.sparse.layout import Layout, layout
from raysparse.sparse.pattern import Pattern
from raysparse.sparse.straight_through import Hidden

CHECK_EVERY = 100  # updates between two comparisons of masks over the ranks: hashing 44M weights takes 50 ms


class DenseWeights:
    """settings: of methods/nm_ste.py, or alike. weights: by parameter name, as the model has them."""

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, nn.Parameter],
        settings: Any,
        groups: Sequence[Sequence[str]] | None,
    ) -> None:
        self._weights = weights
        self._settings = settings
        self._stages = stages(model, weights, settings, groups)
        self._hidden = Hidden()
        self._hidden_average: Hidden | None = None  # of the moving average, from its first update on

    def layout(self, step: int) -> Layout:
        """Of the stage after so many steps."""
        index: int = self._settings.stage(step)
        return self._stages[index]

    def due(self, step: int) -> bool:
        """Whether masks are computed anew after optimizer step number `step`."""
        return step % self._settings.refresh_interval == 0 or self.layout(step) is not self.layout(step - 1)

    @torch.no_grad()
    def masks(self, step: int) -> dict[str, Tensor]:
        """By the magnitude of the dense weights: in each group the largest, ties to the lower index."""
        found = {}
        now = self.layout(step)
        for name, weight in self._weights.items():
            pattern, active = now.patterns[name], now.counts[name]
            mask = torch.ones_like(weight, dtype=torch.bool)
            if active < weight.numel():
                mask.copy_(pattern.first(weight.detach().abs(), pattern.count(active)))
            found[name] = mask
        return found

    @torch.no_grad()
    def show(self) -> None:
        """The dense weights, and their gradients with what draws the hidden ones to zero."""
        self._hidden.show(self._weights)
        if self._settings.ste == "plain":
            return
        for name, hidden in self._hidden.values.items():
            gradient = self._weights[name].grad
            if gradient is not None:
                gradient.add_(hidden, alpha=self._settings.sr_lambda)

    def hide(self, bits: Mapping[str, Tensor]) -> None:
        self._hidden.hide(self._weights, bits)

    def show_average(self, average: Mapping[str, Tensor]) -> None:
        """The average's dense values; call it while the weights are shown."""
        if self._hidden_average is None:  # it began as a copy of the weights, whose hidden values are still those
            self._hidden_average = self._hidden.copy()
        self._hidden_average.show(average)

    def hide_average(self, average: Mapping[str, Tensor], bits: Mapping[str, Tensor]) -> None:
        assert self._hidden_average is not None
        self._hidden_average.hide(average, bits)

    def state_dict(self) -> dict[str, Any]:
        average = self._hidden_average
        return {"weights": self._hidden.state_dict(), "average": None if average is None else average.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """UsageError where it is of another model."""
        self._hidden.load_state_dict(state.get("weights", {}), self._weights)
        self._hidden_average = None
        if state.get("average") is not None:
            self._hidden_average = Hidden()
            self._hidden_average.load_state_dict(state["average"], self._weights)


def stages(
    model: nn.Module, weights: Mapping[str, Tensor], settings: Any, groups: Sequence[Sequence[str]] | None = None
) -> list[Layout]:
    """The layout of every stage in its order. UsageError as `layout`."""
    final = layout(model, weights, settings, groups)
    return [_stage(final, settings, n, m) for n, m in settings.patterns()]


def _stage(final: Layout, settings: Any, n: int, m: int) -> Layout:
    """The layout under another N:M. A layer whose inputs this M does not divide is dense until a later stage."""
    plugin, element = plugins.load("patterns", "nm"), plugins.load("patterns", "element")
    here = settings.model_copy(update={"sparsity": 1 - n / m, "m": m})
    patterns: dict[str, Pattern] = {}
    counts, dense = {}, dict(final.dense)
    for name, pattern in final.patterns.items():
        found = final.dense.get(name) or plugin.of(pattern.shape, here)
        whole = math.prod(pattern.shape)
        if isinstance(found, str):
            dense[name], found = found, element.of(pattern.shape, here)
        patterns[name] = found
        counts[name] = whole if name in dense else whole * n // m
    return Layout(patterns, counts, [], dense)
