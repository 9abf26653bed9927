"""Which connections of a layer are there: at first, and after it was pruned and grown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from raysparse.sparse import masks
from raysparse.sparse.criteria import CRITERIA, Layer
from raysparse.sparse.layout import Layout
from raysparse.sparse.method import Method
from raysparse.sparse.pattern import Pattern

_TOGETHER = 1 << 24  # units of layers that are chosen in one call: some ten tensors of so many numbers, 64 MB each


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
        layer = Layer(name, weight, None, self.seed, 0, pattern, settings=self.settings)
        scores = layer.drawn(by=torch.device("cpu"))  # every device starts alike
        return _spread(weight, pattern, pattern.first(scores, pattern.count(active)))

    def updated(
        self,
        weights: Mapping[str, Tensor],
        known: Mapping[str, Tensor],
        layout: Layout,
        step: int,
        ratio: float,
        gradients: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """The `known` masks after a share (`ratio`) of each layer's active units was pruned and as many were grown.

        Grown are those of the highest scores among all that are then inactive.

        As in the RigL paper (I not in θ \\ I_drop) and code, a connection just pruned can be grown again; it then was
        never away and keeps its weight and moments. So the method is also defined where fewer weights are inactive than
        are pruned. A layer that got no gradient is left as it is: then its mask itself is returned.
        """
        changing = []
        for name, weight in weights.items():
            pattern, active, gradient = layout.patterns[name], layout.counts[name], gradients.get(name)
            count = round(ratio * pattern.count(active))
            unused = self.method.needs is not None and gradient is None
            if count and not unused and active < weight.numel():
                units = pattern.of_mask(known[name])
                layer = Layer(name, weight, gradient, self.seed, step, pattern, units, count, self.settings)
                changing.append(layer)
        found = dict(known)
        for alike in _alike(changing):
            for layer, units in zip(alike, self._chosen(alike), strict=True):
                found[layer.name] = _spread(layer.weight, layer.pattern, units)
        return found

    def _chosen(self, alike: list[Layer]) -> Tensor:
        """The layers' new units, [layers, units]."""
        assert self.method.prune is not None
        assert self.method.grow is not None
        pattern, count = alike[0].pattern, alike[0].count
        before = _stacked([cast(Tensor, layer.candidates) for layer in alike])
        worst = _stacked([CRITERIA[self.method.prune](layer) for layer in alike])
        kept = _each(pattern.pruned, before, worst, count)
        free = zip(alike, ~kept, strict=True)
        best = _stacked([CRITERIA[self.method.grow](replace(layer, candidates=units)) for layer, units in free])
        return _each(pattern.grown, kept, best, count)


def _alike(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    """Layers that one call chooses for: on a GPU those of one shape and count, else each alone.

    To start operations takes a GPU's host longer than they run: 51 for each of U-ViT's layers made an update 48 ms on
    an H200, where a step was 31. Its 52 layers are of five kinds: 21 operations a layer are left. U-Nets have more.
    """
    groups: dict[object, list[Layer]] = {}
    for layer in layers:
        if masks.on_host(layer.weight):
            yield [layer]
        else:
            key = type(layer.pattern), layer.pattern.shape, layer.count, layer.weight.dtype, layer.weight.device
            groups.setdefault(key, []).append(layer)
    for group in groups.values():
        size = max(1, _TOGETHER // math.prod(group[0].pattern.units))
        yield from (group[first : first + size] for first in range(0, len(group), size))


def _stacked(tensors: list[Tensor]) -> Tensor:
    """One alone is not copied."""
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]


def _each(choose: Callable[[Tensor, Tensor, int], Tensor], units: Tensor, scores: Tensor, count: int) -> Tensor:
    """choose(units, scores, count) of each layer."""
    if len(units) == 1:
        return choose(units[0], scores[0], count)[None]
    together: Tensor = torch.vmap(choose, in_dims=(0, 0, None))(units, scores, count)
    return together


def _spread(weight: Tensor, pattern: Pattern, units: Tensor) -> Tensor:
    """A mask in the weight's memory format from a layer's units."""
    mask = pattern.spread(units)
    if mask is units and mask.stride() == weight.stride():
        return mask
    return torch.empty_like(weight, dtype=torch.bool).copy_(mask)
