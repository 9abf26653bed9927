"""What the engine has to know about optimizers: whose zeros stay, and which of their tensors are moments."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn, optim

from raysparse.errors import UsageError
from raysparse.sparse import masks
from raysparse.sparse.masks import maskable, put, true_indices, zero_outside

# With weight, gradient and moments at 0 these leave a weight at exactly 0 (measured over 50 steps, DESIGN decision 1).
# Muon does not: it orthogonalises whole matrices. A class that is not listed is not trusted, a subclass neither.
KEEPS_ZEROS: frozenset[type] = frozenset(
    {
        optim.AdamW,
        optim.Adam,
        optim.SGD,
        optim.RMSprop,
        optim.NAdam,
        optim.RAdam,
        optim.Adagrad,
        optim.Adafactor,
    }
)
NOT_MOMENTS = frozenset({"step_size"})  # Rprop's own learning rates: at 0 a grown weight would never move


def keeps_zeros(optimizer: optim.Optimizer) -> bool:
    """Whether masked gradients are enough to keep pruned weights at 0 under this optimizer."""
    return type(optimizer) in KEEPS_ZEROS


def moments(optimizer: optim.Optimizer, weight: nn.Parameter) -> Iterator[Tensor]:
    """The state tensors that hold one number per weight: Adam's three, SGD's and RMSprop's buffers, and the like."""
    if weight not in optimizer.state:  # reading a missing entry would create it
        return
    for key, value in optimizer.state[weight].items():
        if isinstance(value, Tensor) and value.shape == weight.shape and key not in NOT_MOMENTS:
            yield value


def clear(optimizer: optim.Optimizer, weight: nn.Parameter, bits: Tensor) -> None:
    """Zero the weight and its moments in place outside a mask; bits: its `masks.all_bits`."""
    for tensor in (weight, *moments(optimizer, weight)):
        zero_outside(tensor, bits.to(tensor.device))


class Undo:
    """Zeroes weights and moments in place and can give them their values back."""

    def __init__(self) -> None:
        self._before: list[tuple[Tensor, Tensor | None, Tensor]] = []  # tensor, index (None: all of it), values
        self._counts: list[int | Tensor] = []

    @property
    def positions(self) -> int | Tensor:
        """Active weights zeroed so far; where a GPU counted them, a tensor, which is not waited for."""
        tensors = [count for count in self._counts if isinstance(count, Tensor)]
        known = sum(count for count in self._counts if not isinstance(count, Tensor))
        return torch.stack([count.to(tensors[0].device) for count in tensors]).sum() + known if tensors else known

    @torch.no_grad()
    def zero(self, optimizer: optim.Optimizer, weight: nn.Parameter, before: Tensor, after: Tensor) -> None:
        """Zero the weight and its moments where they are not active both before and after; bits: `masks.all_bits`."""
        kept = before & after
        pruned = before ^ kept
        # On a GPU whole copies: indices would have to be waited for.
        # numpy finds those of a bool mask three times as fast as others that are not 0.
        index = true_indices(pruned.neg().view(torch.bool)) if masks.on_host(pruned) else None
        self._counts.append(pruned.count_nonzero() if index is None else index.numel())
        for tensor in (weight, *moments(optimizer, weight)):
            self._before.append((tensor, index, tensor.clone() if index is None else tensor.take(index)))
            zero_outside(tensor, kept)

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what `zero` has zeroed of active weights; harmless to repeat."""
        for tensor, index, values in self._before:
            if index is None:
                tensor.copy_(values)
            else:
                put(tensor, index, values)


def optimized_weights(
    model: nn.Module, optimizer: optim.Optimizer, keep_dense: Iterable[str]
) -> dict[str, nn.Parameter]:
    """What is masked of a model, by name. UsageError where that is nothing, or not what the optimizer moves, and for an
    optimizer whose steps the engine cannot follow."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise UsageError(
            f"{type(optimizer).__name__} takes gradients of its own within a step, which are never masked, and keeps "
            "directions over all weights at once: train with an optimizer whose step() needs no closure."
        )
    weights = maskable(model, keep_dense)
    if not weights:
        raise UsageError(
            "the model has nothing to mask: no trainable weight of a convolution, linear layer, attention or GRU "
            "outside keep_dense."
        )
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(weight) in optimized for weight in weights.values()):
        raise UsageError("the optimizer holds none of the model's maskable weights: build it from this model.")
    return weights
