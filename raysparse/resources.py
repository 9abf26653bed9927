"""The `resources` section of a sweep file: what a trial gets, and how many fit on a node."""

from __future__ import annotations

import math
from typing import Self

from pydantic import Field, model_validator

from raysparse.section import Section

RAY_UNIT = 1e-4  # Ray counts resources in ten-thousandths


class Resources(Section):
    workers: int = Field(1, ge=1)  # DDP processes per trial
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: float = Field(0, ge=0)  # below 1: trials share a GPU, each has that share of its memory
    max_concurrent: int | None = Field(None, ge=1)  # None: as many as fit
    # So long a trial may stand still, asleep and waiting for nothing: then it is started again. 40 s leave time to
    # write its stacks and to say why within a minute. What works, compiles, or waits for storage has half an hour.
    hung_after_s: float = Field(40, ge=1)

    @model_validator(mode="after")
    def _gpus_can_be_had(self) -> Self:
        gpus = self.gpus_per_worker
        if gpus > 1 and not gpus.is_integer():
            raise ValueError(f"gpus_per_worker above 1 must be a whole number: Ray splits no further, got {gpus:g}")
        if 0 < gpus < RAY_UNIT:
            raise ValueError(f"gpus_per_worker must be 0 or at least {RAY_UNIT:g}, which is Ray's unit, got {gpus:g}")
        if self.workers > 1 and 0 < gpus < 1:
            raise ValueError(
                f"{self.workers} workers cannot share a GPU, as gpus_per_worker {gpus:g} asks: NCCL wants one for each "
                "rank; give a whole number, or workers: 1"
            )
        return self

    def workers_on(self, cpus: float, gpus: float) -> int:
        """Workers that fit on a node, as Ray counts. A share of a GPU lies on one: of .4 four fit on two, not five.

        gpus: inf where they are not known yet.
        """
        share, fit = self.gpus_per_worker, _units(cpus) // max(1, _units(self.cpus_per_worker))
        if not share or math.isinf(gpus):
            return fit
        on_gpus = math.floor(gpus) * self.workers_per_gpu if share < 1 else math.floor(gpus / share)
        return min(fit, on_gpus)

    @property
    def workers_per_gpu(self) -> int:
        """Trials that share a GPU; 1 where one has it, or several, for itself."""
        return _units(1) // _units(self.gpus_per_worker) if 0 < self.gpus_per_worker < 1 else 1


def _units(quantity: float) -> int:
    """A resource as Ray counts it, cut off: of .1429 six fit, of 1/7 seven."""
    return math.floor(quantity / RAY_UNIT + 1e-6)
