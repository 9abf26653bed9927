"""The `asha` section of a sweep file: where the rungs are, and who goes on past them."""

from __future__ import annotations

import itertools
from typing import Self

from pydantic import Field, field_validator, model_validator

from raysparse.config import LARGEST_SWEEP
from raysparse.section import Section


class Asha(Section):
    """Asynchronous successive halving on the intermediate FID, in optimizer steps (Li et al. 2020)."""

    # No trial is stopped before grace_steps, the first rung; the others are its multiples by reduction_factor.
    grace_steps: int | None = Field(None, ge=1)
    rungs: tuple[int, ...] = ()  # instead of grace_steps: the steps of all rungs
    reduction_factor: float = Field(3, gt=1)  # one in so many goes on past a rung
    # False: the first at a rung goes on, with nobody to be compared with. True: all stop at the first rung; once all
    # have come there the best go on as second chances; slots that are free until then wait. Past each further rung the
    # best 1 in reduction_factor of those who came there, rounded down.
    explore_first: bool = False
    # So many stopped trials go on, one rung at least, once the search has no new ones; more until one is completed.
    second_chances: int = Field(0, ge=0, le=LARGEST_SWEEP)

    @field_validator("rungs")
    @classmethod
    def _rising(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if any(step < 1 for step in steps) or any(a >= b for a, b in itertools.pairwise(steps)):
            raise ValueError(f"rungs are steps from 1 on, each above the one before, got {list(steps)}")
        return steps

    @model_validator(mode="after")
    def _something_is_completed(self) -> Self:
        if (self.grace_steps is None) == (not self.rungs):
            raise ValueError("give either grace_steps, the first rung, or rungs, the steps of all of them")
        if self.explore_first and not self.second_chances:
            raise ValueError("explore_first stops every trial at the first rung; give second_chances as well")
        return self

    @property
    def given_steps(self) -> list[tuple[str, int]]:
        """(setting, step) of each rung that is written down."""
        return [("grace_steps", self.grace_steps)] if self.grace_steps else [("rungs", step) for step in self.rungs]

    def rung_steps(self, total_steps: int) -> list[float]:
        """The steps of the rungs below a trial's last step, rising."""
        if not self.grace_steps:
            return [float(step) for step in self.rungs if step < total_steps]
        found, step = [], float(self.grace_steps)
        while step < total_steps:
            found.append(step)
            step *= self.reduction_factor
        return found
