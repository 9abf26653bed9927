"""Whether a saved engine state is one of this engine's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raysparse.errors import UsageError
from raysparse.sparse.layout import Layout

if TYPE_CHECKING:
    from raysparse.sparse.engine import SparseEngine


def check_counters(engine: SparseEngine, state: Mapping[str, Any]) -> None:
    """UsageError where a state lacks something, is of another method or seed, or counts what is no count."""
    for key in ("method", "seed", "step", "updates", "replaced", "masks"):
        if not isinstance(state, Mapping) or key not in state:
            raise UsageError(f"the engine state has no {key!r}: it is not one of SparseEngine.state_dict().")
    for key in ("method", "seed"):
        if state[key] != getattr(engine, key):
            raise UsageError(f"the engine state has {key} {state[key]!r}, this engine {getattr(engine, key)!r}.")
    counters = [state[key] for key in ("step", "updates", "replaced")]
    if not all(type(counter) is int and counter >= 0 for counter in counters) or not isinstance(
        state["masks"], Mapping
    ):
        raise UsageError("the engine state has a counter that is no count, or masks that are no tensors by name.")


def checked_masks(engine: SparseEngine, state: Mapping[str, Any], expected: Layout) -> dict[str, Tensor]:
    """The masks of a state. UsageError where its layers, shapes, counts or pattern are others."""
    counts = expected.counts
    masks: dict[str, Tensor] = state["masks"]
    if missing := sorted(set(counts) - set(masks)):
        raise UsageError(f"the engine state lacks masks of this model: {', '.join(missing)}.")
    if extra := sorted(set(masks) - set(counts)):
        raise UsageError(f"the engine state has masks that this model does not: {', '.join(extra)}.")
    for name, mask in masks.items():
        shape = tuple(engine.masks[name].shape)
        if not isinstance(mask, Tensor):
            raise UsageError(f"the saved mask of {name!r} is {type(mask)}, not a tensor.")
        if tuple(mask.shape) != shape or mask.dtype != torch.bool:
            raise UsageError(f"the saved mask of {name!r} is {mask.dtype} {tuple(mask.shape)}, not torch.bool {shape}.")
        if (active := int(mask.count_nonzero())) != counts[name]:
            raise UsageError(
                f"the saved mask of {name!r} has {active} active weights, this engine's settings give {counts[name]}: "
                f"build it with the same sparsity, allocation and groups."
            )
        if active < mask.numel() and not expected.patterns[name].valid(mask):
            raise UsageError(
                f"the saved mask of {name!r} does not keep the pattern {engine.pattern!r}: build the engine with the "
                f"one it was made with."
            )
    return masks


def check_ranges(expected: Sequence[Mapping[str, Tensor]], saved: Sequence[Mapping[str, Tensor]]) -> None:
    """UsageError where saved masks by timestep are not this engine's: they follow from its settings and seed alone."""
    same = len(expected) == len(saved) and all(
        ours.keys() == theirs.keys() and all(torch.equal(mask.cpu(), theirs[name].cpu()) for name, mask in ours.items())
        for ours, theirs in zip(expected, saved, strict=True)
    )
    if not same:
        raise UsageError("the saved masks per range of timesteps are of other settings or of another seed.")
