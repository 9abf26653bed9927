"""When the topology is updated, and which share of the active weights is replaced then; torch-free.

A schedule is a function here, found by its name: progress -> factor in [0, 1] on a setting's start value; at factor f
the setting is end + (start - end) f. It starts at 1 and never rises.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from raysparse import plugins
from raysparse.errors import UsageError, unknown


@dataclass(frozen=True)
class Progress:
    """What a schedule may look at."""

    passed: float  # share of the updating phase that has passed, in [0, 1)
    stalls: int  # how often the FID has stalled so far


def constant(progress: Progress) -> float:
    return 1.0


def cosine(progress: Progress) -> float:
    """Evci et al. 2020, eq. 1."""
    return 0.5 * (1 + math.cos(math.pi * progress.passed))


def linear(progress: Progress) -> float:
    return 1.0 - progress.passed


def stall(progress: Progress) -> float:
    """Half as much each time the FID stalls."""
    return 0.5**progress.stalls


SCHEDULES: dict[str, Callable[[Progress], float]] = plugins.functions(__name__)


@dataclass(frozen=True)
class UpdateSchedule:
    """Updates every `interval` optimizer steps while step < `end`; end None: to the last step.

    UsageError: prune_ratio outside (0, 1], interval or end below 1, unknown schedule, one that ends without an end.
    """

    prune_ratio: float  # in (0, 1]: share of a layer's active units that an update prunes
    interval: int  # optimizer steps
    schedule: str = "constant"  # of prune_ratio
    end: int | None = None  # optimizer steps; no update at or after it
    prune_ratio_end: float = 0.0
    interval_schedule: str = "constant"
    interval_end: int | None = None  # optimizer steps
    stall_reports: int = 2  # FIDs in a row without a better one
    stall_tolerance: float = 0.01  # share of the best FID by which a better one is lower

    def __post_init__(self) -> None:
        if not 0 < self.prune_ratio <= 1:
            raise UsageError(f"prune_ratio is {self.prune_ratio}; it must be in (0, 1].")
        if self.interval < 1 or int(self.interval) != self.interval:
            raise UsageError(f"update_interval is {self.interval}; it counts optimizer steps and must be at least 1.")
        if self.end is not None and self.end < 1:
            raise UsageError(f"update_end_step is {self.end}; it counts optimizer steps and must be at least 1.")
        for what, name in (("prune_schedule", self.schedule), ("interval_schedule", self.interval_schedule)):
            if name not in SCHEDULES:
                raise UsageError(unknown(what, str(name), SCHEDULES))
            if name in ("cosine", "linear") and self.end is None:
                raise UsageError(f"{what} {name!r} ends at update_end_step: give update_end_step too.")

    @classmethod
    def of(cls, settings: Any, end: int | None) -> Self:
        """From the settings of a dynamic method (settings.Dynamic); end: optimizer steps."""
        return cls(
            prune_ratio=settings.prune_ratio,
            interval=settings.update_interval,
            schedule=settings.prune_schedule,
            end=end,
            prune_ratio_end=settings.prune_ratio_end,
            interval_schedule=settings.interval_schedule,
            interval_end=settings.update_interval_end,
            stall_reports=settings.stall_reports,
            stall_tolerance=settings.stall_tolerance,
        )

    def ratio(self, step: int, stalls: int = 0) -> float:
        """Share of the active units to prune at `step`, between prune_ratio_end and prune_ratio."""
        return self._value(self.schedule, self.prune_ratio, self.prune_ratio_end, step, stalls)

    def interval_at(self, step: int, stalls: int = 0) -> int:
        """ΔTe at `step`, at least 1."""
        end = self.interval_end or 0
        return max(1, round(self._value(self.interval_schedule, self.interval, end, step, stalls)))

    def updates(self, steps: int) -> int:
        """How many updates the first `steps` steps have if the FID never stalls."""
        if self.interval_schedule == "constant":
            return (steps if self.end is None else min(steps, self.end - 1)) // self.interval
        clock, count = Clock(self), 0
        while (due := clock.next_step()) <= steps and (self.end is None or due < self.end):
            clock.updated(due)
            count += 1
        return count

    def _value(self, name: str, start: float, end: float, step: int, stalls: int) -> float:
        factor = SCHEDULES[name](Progress(step / self.end if self.end else 0.0, stalls))
        return start if factor == 1 else end + (start - end) * factor


class Clock:
    """Where an UpdateSchedule stands in one training: the next update and how often the FID has stalled.

    The state is three numbers and a step; it follows from the steps and the FIDs alone, so that every rank and every
    resume has the same.
    """

    def __init__(self, schedule: UpdateSchedule) -> None:
        self.schedule = schedule
        self.stalls = 0
        self._best: float | None = None  # the lowest FID so far
        self._since = 0  # reports since then, or since the last stall
        self._last = 0  # the step of the last update

    def next_step(self) -> int:
        """The step of the next update, if it is before the end."""
        return self._last + self.schedule.interval_at(self._last, self.stalls)

    def due(self, step: int) -> bool:
        """Whether the topology is updated after optimizer step number `step` (the first step is 1)."""
        schedule = self.schedule
        if schedule.end is not None and step >= schedule.end:
            return False
        if schedule.interval_schedule == "constant":
            return step % schedule.interval == 0
        return step >= self.next_step()

    def due_within(self, step: int, window: int) -> bool:
        """Whether an update is due after one of the `window` steps that begin with `step`."""
        return any(self.due(later) for later in range(step, step + window))

    def ratio(self, step: int) -> float:
        """Share of the active units to prune at `step`."""
        return self.schedule.ratio(step, self.stalls)

    def updated(self, step: int) -> None:
        """Tell that the topology was updated after `step`."""
        self._last = step

    def observe(self, fid: float) -> None:
        """Tell a FID of the model in training, of all reports in their order; of no use without a schedule `stall`."""
        if "stall" not in (self.schedule.schedule, self.schedule.interval_schedule):
            return
        if self._best is None or fid < self._best * (1 - self.schedule.stall_tolerance):
            self._best, self._since = fid, 0
            return
        self._since += 1
        if self._since >= self.schedule.stall_reports:
            self.stalls, self._since = self.stalls + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"stalls": self.stalls, "best": self._best, "since": self._since, "last": self._last}

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """step: optimizer steps done. An empty state is of a version that knew constant schedules only."""
        self.stalls, self._best = state.get("stalls", 0), state.get("best")
        self._since = state.get("since", 0)
        self._last = state.get("last", step - step % self.schedule.interval)
