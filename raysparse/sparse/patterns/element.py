"""Each weight by itself: unstructured sparsity, for every layer."""

from __future__ import annotations

from typing import Any

from raysparse.sparse.pattern import Pattern, Shape, nothing_to_check

SETTINGS: frozenset[str] = frozenset()  # which settings of settings.Sparse it uses
FIXED: dict[str, Any] = {}  # settings whose value it decides
MATRICES_ONLY = False
check = nothing_to_check


def of(shape: Shape, settings: Any) -> Pattern | str:
    return Pattern(shape)
