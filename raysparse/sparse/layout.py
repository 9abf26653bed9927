"""Which pattern each layer has and how many of its weights are active, for the engine and for what it costs.

Allocation decides on weights, a pattern on whole units. Each layer gets the number of units nearest to its share, then
single units are moved until the sum is as near to round((1 - S) x all weights) as units allow: exact where one layer
that is neither full nor empty is masked by element. A layer that cannot take the pattern stays dense, like one whose
density would exceed 1: the others make up for it, so that S is the same for every pattern. Except N:M, whose density is
given.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from raysparse import plugins
from raysparse.errors import UsageError
from raysparse.sparse import allocation
from raysparse.sparse.masks import shapes, unwrapped
from raysparse.sparse.pattern import Pattern, matrix


@dataclasses.dataclass(frozen=True)
class Layout:
    """By parameter name."""

    patterns: dict[str, Pattern]
    counts: dict[str, int]  # active weights
    by_element: list[str]  # layers that another pattern leaves to this one
    dense: dict[str, str]  # layers that the pattern leaves dense -> why

    def densities(self) -> dict[str, float]:
        """Share of active weights, in (0, 1]."""
        return {name: count / math.prod(self.patterns[name].shape) for name, count in self.counts.items()}


def layout(
    model: nn.Module, weights: Mapping[str, Tensor], settings: Any, groups: Sequence[Sequence[str]] | None = None
) -> Layout:
    """settings: of a sparse method. groups: layers allocated as one; None: `model.allocation_groups`.

    UsageError: as allocation.counts; the pattern fits no layer; what stays dense is more than S leaves.
    """
    groups = getattr(unwrapped(model), "allocation_groups", ()) if groups is None else groups
    allocated = shapes(model, weights)
    patterns, by_element, dense = patterns_of(weights, settings)
    if settings.pattern == "nm":
        counts = {name: math.prod(p.shape) if name in dense else _given(p) for name, p in patterns.items()}
        return Layout(patterns, counts, by_element, dense)
    counts = allocation.counts(
        allocated,
        sparsity=settings.sparsity,
        allocation=settings.allocation,
        groups=groups,
        units={name: pattern.size for name, pattern in patterns.items()},
        dense=dense,
    )
    return Layout(patterns, counts, by_element, dense)


def patterns_of(weights: Mapping[str, Tensor], settings: Any) -> tuple[dict[str, Pattern], list[str], dict[str, str]]:
    """`patterns`, `by_element` and `dense` of a Layout. UsageError: the pattern fits no layer."""
    plugin, element = plugins.load("patterns", settings.pattern), plugins.load("patterns", "element")
    patterns: dict[str, Pattern] = {}
    by_element: list[str] = []
    dense: dict[str, str] = {}
    for name, weight in weights.items():
        shape = tuple(weight.shape)
        if plugin.MATRICES_ONLY and matrix(shape) is None:
            found: Pattern | str = "it is a convolution with a kernel"
            if settings.other_layers == "element":
                by_element.append(name)
                patterns[name] = element.of(shape, settings)
                continue
        else:
            found = plugin.of(shape, settings)
        if isinstance(found, str):
            dense[name] = found
            patterns[name] = element.of(shape, settings)
        else:
            patterns[name] = found
    if len(dense) + len(by_element) == len(weights):
        reasons = sorted({*dense.values(), *(["it is a convolution with a kernel"] if by_element else [])})
        some = "; ".join(reasons[:3]) + ("; ..." if len(reasons) > 3 else "")
        raise UsageError(f"pattern {settings.pattern!r} fits no layer of this model ({some}); use another pattern.")
    return patterns, by_element, dense


def _given(pattern: Any) -> int:
    """Active weights of patterns.nm.Groups."""
    return int(math.prod(pattern.shape) * pattern.n // pattern.m)
