"""Sparse-to-sparse training of any PyTorch model: `SparseEngine` and what it is made of.

The name is resolved on first use, so that reading a method's settings (`raysparse.sparse.methods`) imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raysparse.sparse.engine import SparseEngine

__all__ = ["SparseEngine"]


def __getattr__(name: str) -> Any:
    if name == "SparseEngine":
        from raysparse.sparse.engine import SparseEngine

        return SparseEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
