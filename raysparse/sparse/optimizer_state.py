"""What the engine has to know about optimizers: whose zeros stay, and which of their tensors are moments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn, optim

from raysparse.errors import UsageError
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
        self.positions: int | Tensor = 0  # weights zeroed so far
        self._before: list[tuple[Tensor, Tensor, Tensor]] = []  # tensor, where, values

    @torch.no_grad()
    def zero(self, optimizer: optim.Optimizer, weight: nn.Parameter, where: Tensor) -> None:
        """Zero the weight and its moments at few positions; where: bool, the weight's shape."""
        if where.device.type == "cpu":
            index = true_indices(where)
            self.positions += index.numel()
            for tensor in (weight, *moments(optimizer, weight)):
                self._before.append((tensor, index, tensor.take(index)))
                put(tensor, index, 0)
            return
        zeroed, known = where.count_nonzero(), self.positions
        self.positions = zeroed.to(known.device) + known if isinstance(known, Tensor) else zeroed + known
        for tensor in (weight, *moments(optimizer, weight)):  # whole copies: indices would have to be waited for
            self._before.append((tensor, where, tensor.clone()))
            tensor.masked_fill_(where, 0)

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what `zero` has zeroed; harmless to repeat."""
        for tensor, where, values in self._before:
            if where.dtype == torch.bool:
                tensor.copy_(values)
            else:
                put(tensor, where, values)


def optimized_weights(
    model: nn.Module, optimizer: optim.Optimizer, keep_dense: Iterable[str]
) -> dict[str, nn.Parameter]:
    """What is masked of a model, by name. UsageError where that is nothing, or not what the optimizer moves."""
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
