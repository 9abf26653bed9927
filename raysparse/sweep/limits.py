"""Hard limits of a sweep: where one is reached, its trials save themselves, and a resume can go on from there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import Field

from raysparse.resources import Resources
from raysparse.section import Section
from raysparse.sweep.board import Board, Row

DISK_LOOK_S = 30.0  # between two sums over the folder's files, of which 600 trials have thousands


class Limits(Section):
    """None: no such limit. Hours are of one run of the driver; the others count all that the sweep has had so far."""

    max_trials: int | None = Field(None, ge=1)  # trials started, confirmations included
    max_hours: float | None = Field(None, gt=0)
    max_gpu_hours: float | None = Field(None, gt=0)  # of trials that run, times their GPUs
    max_disk_bytes: int | None = Field(None, ge=1)  # of the results folder


class Guard:
    """Asked between two steps of the driver's loop."""

    def __init__(
        self,
        limits: Limits,
        resources: Resources,
        results: Path,
        board: Board,
        make_room: Callable[[], int] = lambda: 0,
        more: Callable[[], bool] = lambda: True,
    ) -> None:
        """make_room: removes what nobody needs and says how many bytes; tried before --max-disk ends the sweep.

        more: whether the sweep is known to have trials to come; without any, --max-trials ends nothing.
        """
        self._limits, self._results, self._board, self._make_room = limits, results, board, make_room
        self._more = more
        self._gpus = resources.workers * resources.gpus_per_worker
        self._began = time.monotonic()
        self._disk_bytes, self._looked = 0, float("-inf")
        self._reason: str | None = None

    def may_start(self, row: Row | None = None) -> bool:
        """Whether a trial may begin; one that had begun before may go on. row: None: one that is not planned yet."""
        if self._limits.max_trials is None or (row is not None and _has_begun(row)):
            return True
        return sum(map(_has_begun, self._board.rows.values())) < self._limits.max_trials

    def reached(self) -> str | None:
        """The limit that is reached, in words; stays so once it is."""
        self._reason = self._reason or self._now()
        return self._reason

    def _now(self) -> str | None:
        limits = self._limits
        hours = (time.monotonic() - self._began) / 3600
        if limits.max_hours is not None and hours >= limits.max_hours:
            return f"--max-hours {limits.max_hours:g} is reached"
        if (
            limits.max_gpu_hours is not None
            and (used := self._board.busy_s(time.time()) / 3600 * self._gpus) >= limits.max_gpu_hours
        ):
            return f"--max-gpu-hours {limits.max_gpu_hours:g} is reached: {used:.2f} GPU hours"
        if limits.max_disk_bytes is not None and self._disk(limits.max_disk_bytes) >= limits.max_disk_bytes:
            return f"--max-disk {limits.max_disk_bytes:,} bytes is reached: {self._disk_bytes:,} in {self._results}"
        open_ones = [row for row in self._board.rows.values() if row.open and _has_begun(row)]
        if not self.may_start() and not open_ones and self._more():
            return f"--max-trials {limits.max_trials} is reached"
        return None

    def _disk(self, limit: int) -> int:
        if time.monotonic() - self._looked >= DISK_LOOK_S:
            self._looked = time.monotonic()
            self._disk_bytes = disk_bytes(self._results)
            if self._disk_bytes >= limit and self._make_room():
                self._disk_bytes = disk_bytes(self._results)
        return self._disk_bytes


def _has_begun(row: Row) -> bool:
    return row.heard is not None


def disk_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; one that goes away meanwhile counts as nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:
                continue
    return total
