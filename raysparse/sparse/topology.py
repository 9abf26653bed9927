"""Which connections of a layer are there: at first, and after it was pruned and grown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raysparse.sparse.criteria import CRITERIA, Layer, random
from raysparse.sparse.layout import Layout
from raysparse.sparse.method import Method
from raysparse.sparse.pattern import Pattern


@dataclass(frozen=True)
class Topology:
    """How a method chooses masks: bool tensors in the shape and memory format of their weight."""

    method: Method
    settings: Any  # the method's Settings
    seed: int

    def first(self, name: str, weight: Tensor, layout: Layout) -> Tensor:
        """A layer's first mask: so many of its units at random as the layout gives it."""
        pattern, active = layout.patterns[name], layout.counts[name]
        if active == weight.numel():
            return torch.ones_like(weight, dtype=torch.bool)
        scores = random(Layer(name, weight, None, self.seed, 0, pattern, settings=self.settings))
        return _spread(weight, pattern, pattern.first(scores, pattern.count(active)))

    def updated(
        self, name: str, weight: Tensor, mask: Tensor, layout: Layout, step: int, ratio: float, gradient: Tensor | None
    ) -> Tensor:
        """Prune a share (`ratio`) of the layer's active units, grow as many among all that are then inactive.

        As in the RigL paper (I not in θ \\ I_drop) and code, a connection just pruned can be grown again; it then was
        never away and keeps its weight and moments. So the method is also defined where fewer weights are inactive than
        are pruned. A layer that got no gradient is left as it is: then `mask` itself is returned.
        """
        pattern, active = layout.patterns[name], layout.counts[name]
        count = round(ratio * pattern.count(active))
        prune, grow = self.method.prune, self.method.grow
        assert prune is not None
        assert grow is not None
        unused = self.method.needs is not None and gradient is None
        if count == 0 or unused or active == mask.numel():
            return mask

        def seen(candidates: Tensor) -> Layer:
            return Layer(name, weight, gradient, self.seed, step, pattern, candidates, count, self.settings)

        units = pattern.of_mask(mask)
        kept = pattern.pruned(units, CRITERIA[prune](seen(units)), count)
        return _spread(weight, pattern, pattern.grown(kept, CRITERIA[grow](seen(~kept)), count))


def _spread(weight: Tensor, pattern: Pattern, units: Tensor) -> Tensor:
    """A mask in the weight's memory format from a layer's units."""
    mask = pattern.spread(units)
    if mask is units and mask.stride() == weight.stride():
        return mask
    return torch.empty_like(weight, dtype=torch.bool).copy_(mask)
