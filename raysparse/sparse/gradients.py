"""The dense gradients that growth looks at, held no longer than they are needed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from raysparse.errors import UsageError
from raysparse.sparse.method import Needs

if TYPE_CHECKING:
    from raysparse.sparse.schedules import Clock

FORGOTTEN = 1e-3  # a moving average leaves out the oldest steps, which together weigh less than this


class DenseGradients:
    """What METHOD.needs: the gradient of an update's own step, or a moving average over the steps before it.

    An average with momentum .9 is 99.9 % of the last 66 steps, so it is begun so many steps before each update and
    dropped after it: one float per weight, and a pass over the gradients, for 66 of 800 steps.
    """

    def __init__(self, needs: Needs | None, momentum: float) -> None:
        self._needs = needs
        self._momentum = momentum
        self._window = window(needs, momentum)
        self._taken: dict[str, Tensor] = {}  # of the step between mask_gradients and after_step
        self._held: dict[str, Tensor] = {}  # of the last step, or the average

    @torch.no_grad()
    def take(self, clock: Clock | None, step: int, weights: Mapping[str, nn.Parameter]) -> None:
        """Copy the gradients of `step` (not done yet) where an update needs them."""
        self._taken = {}
        if self.needed(clock, step):
            self._taken = {name: w.grad.detach().clone() for name, w in weights.items() if w.grad is not None}

    def needed(self, clock: Clock | None, step: int) -> bool:
        """Whether an update looks at the gradients of `step`."""
        return clock is not None and self._window > 0 and clock.due_within(step, self._window)

    def keep(self, skipped: bool) -> None:
        """The step is done: what was taken counts, unless the optimizer skipped it."""
        taken, self._taken = self._taken, {}
        if skipped:
            return
        if self._needs != "momentum":
            self._held = taken
            return
        for name, gradient in taken.items():
            if name in self._held:
                self._held[name].lerp_(gradient, 1 - self._momentum)
            else:
                self._held[name] = gradient.mul_(1 - self._momentum)

    def release(self) -> dict[str, Tensor]:
        """What an update grows by, by parameter name; held no longer."""
        found, self._held = self._held, {}
        return found

    def state_dict(self) -> dict[str, Any]:
        """The average so far; empty where there is none."""
        return {name: value.clone() for name, value in self._held.items()} if self._needs == "momentum" else {}

    def load_state_dict(self, state: Mapping[str, Tensor], weights: Mapping[str, nn.Parameter]) -> None:
        """UsageError where it is of other weights."""
        for name, value in state.items():
            if name not in weights or value.shape != weights[name].shape:
                raise UsageError(f"the saved gradient average of {name!r} belongs to another model.")
        self._taken = {}
        self._held = {name: torch.empty_like(weights[name]).copy_(value).detach() for name, value in state.items()}


def window(needs: str | None, momentum: float) -> int:
    """How many steps before and with an update have a dense gradient; 0 where none is needed."""
    if needs != "momentum":
        return int(needs == "gradient")
    return max(1, math.ceil(math.log(FORGOTTEN) / math.log(momentum))) if momentum else 1
