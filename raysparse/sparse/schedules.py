"""When the topology is updated, and which share of the active weights is replaced then."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from raysparse.errors import UsageError, unknown

# name -> factor on prune_ratio, from the share of the updating phase that has passed, in [0, 1)
PRUNE_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda passed: 1.0,
    "cosine": lambda passed: 0.5 * (1 + math.cos(math.pi * passed)),  # Evci et al. 2020, eq. 1
}


@dataclass(frozen=True)
class UpdateSchedule:
    """Updates every `interval` optimizer steps while step < `end`; end None: to the last step.

    UsageError: prune_ratio outside (0, 1], interval or end below 1, unknown schedule, cosine without an end.
    """

    prune_ratio: float  # in (0, 1]: share of a layer's active weights that an update prunes
    interval: int  # optimizer steps
    schedule: str  # constant or cosine
    end: int | None  # optimizer steps; no update at or after it

    def __post_init__(self) -> None:
        if not 0 < self.prune_ratio <= 1:
            raise UsageError(f"prune_ratio is {self.prune_ratio}; it must be in (0, 1].")
        if self.interval < 1 or int(self.interval) != self.interval:
            raise UsageError(f"update_interval is {self.interval}; it counts optimizer steps and must be at least 1.")
        if self.schedule not in PRUNE_SCHEDULES:
            raise UsageError(unknown("prune_schedule", str(self.schedule), PRUNE_SCHEDULES))
        if self.end is not None and self.end < 1:
            raise UsageError(f"update_end_step is {self.end}; it counts optimizer steps and must be at least 1.")
        if self.schedule == "cosine" and self.end is None:
            raise UsageError("prune_schedule 'cosine' falls to 0 at update_end_step: give update_end_step too.")

    def due(self, step: int) -> bool:
        """Whether the topology is updated after optimizer step number `step` (the first step is 1)."""
        return step % self.interval == 0 and (self.end is None or step < self.end)

    def ratio(self, step: int) -> float:
        """Share of the active weights to prune at `step`, in [0, prune_ratio]."""
        return self.prune_ratio * PRUNE_SCHEDULES[self.schedule](step / self.end if self.end else 0.0)
