"""What a method file declares; torch-free, so that settings can be checked without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Needs = Literal["gradient", "momentum"]


@dataclass(frozen=True)
class Method:
    """One way to train: which connections are there at first, and how they are replaced.

    A method without `prune` and `grow` keeps its first mask. Both are names of functions in `criteria.py`.
    """

    sparse: bool = True  # False: no mask at all
    prune: str | None = None  # criterion whose lowest scores are pruned at a topology update
    grow: str | None = None  # criterion whose highest scores are grown
    needs: Needs | None = None  # what its criteria look at: the update's dense gradient, or its moving average
    by_timestep: bool = False  # a mask per range of timesteps; its settings say which (methods/timesteps.py)
    straight_through: bool = False  # weights stay dense under masks by magnitude, recomputed as they move

    def __post_init__(self) -> None:
        if (self.prune is None) != (self.grow is None) or (self.prune is not None and not self.sparse):
            raise ValueError("a method declares both prune and grow or neither, and neither where it is dense")
        if self.by_timestep and (self.dynamic or not self.sparse or self.straight_through):
            raise ValueError("masks per range of timesteps are fixed")
        if self.straight_through and (self.dynamic or not self.sparse):
            raise ValueError("a method with dense weights under its masks neither prunes nor grows")
        if self.needs is not None and not self.dynamic:
            raise ValueError("a method needs gradients only where it prunes and grows")

    @property
    def dynamic(self) -> bool:
        """Whether the topology changes during training."""
        return self.prune is not None
