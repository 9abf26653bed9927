"""One budget for a sweep's checkpoints: which are kept, and why, and how the others go.

Kept whatever the budget says, because something still reads them:
    of an open trial            the last two: it goes on from them
    of one that may be retried  the last: it would go on from it
    of one that may get a second chance, likewise
    of the dense baseline, the best of each method, the best at each rung, the Pareto front of the search, and all
    trials of the confirm stage: the last, for `raysparse evaluate`, `sample` and `export`
All else is spare. `raysparse gc` removes it; a driver does while the checkpoints are over `storage.checkpoints`, or
before `--max-disk` would end the sweep. What goes is renamed first: a checkpoint is whole or has no checkpoint's name.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raysparse.files import TEMPORARY, set_aside, size_text
from raysparse.space import Sweep
from raysparse.sweep import chances, objectives, views
from raysparse.sweep.board import Board, Ledger, Row
from raysparse.sweep.journal import event
from raysparse.train.folders import CHECKPOINT

LOOK_S = 10.0  # between two looks of a driver: of 600 trials it has to list as many folders
OF_OPEN = 2  # trainable.KEEP_CHECKPOINTS, without importing Ray
LEFTOVER = -1  # the step of what was half written or half removed


@dataclasses.dataclass(frozen=True)
class Stored:
    """One checkpoint on disk, or a leftover."""

    path: Path
    trial_id: str
    step: int
    size_bytes: int
    kept: bool
    why: str
    wanted: tuple[float, ...] = ()  # of two spare ones, the one with the smaller goes first


class Store:
    """The checkpoints of one sweep. Remembers sizes and costs, which do not change."""

    def __init__(self, results: Path, board: Board, sweep: Sweep) -> None:
        self._results, self._board, self._sweep = results, board, sweep
        self._sizes: dict[tuple[Path, int], int] = {}
        self._costs: dict[str, dict[str, float]] = {}

    def survey(self, *, driven: bool) -> list[Stored]:
        """All of them, by trial and step. driven: a driver runs, so that an open trial may be writing."""
        found = []
        reasons = self._reasons()
        for folder in _folders(self._results / "checkpoints"):
            row = self._board.rows.get(folder.name)
            steps = sorted(path for path in _folders(folder) if CHECKPOINT.fullmatch(path.name))
            for place, path in enumerate(reversed(steps), start=1):
                kept, why = _judged(row, place, reasons.get(folder.name))
                wanted = (place == 1, *((row.step, -(row.latest or 0.0)) if row else ()))
                found.append(self._stored(path, int(path.name[5:]), kept, why, wanted))
            for path in _folders(folder):
                if path.name.startswith(TEMPORARY):
                    name = path.name.removeprefix(TEMPORARY)
                    only = name.startswith("step-") and not (folder / name).exists()  # killed while it was replaced
                    kept = row is None or (row.open and (driven or only))
                    why = "the trial is open and goes on from it" if only else "half written or half removed"
                    found.append(self._stored(path, LEFTOVER, kept, why, ()))
        return sorted(found, key=lambda one: (one.trial_id, one.step))

    def remove(self, spare: Iterable[Stored]) -> list[Stored]:
        """Remove some; of a trial that a process still holds, none. -> those that went. OSError: storage that fails."""
        gone = []
        for one in spare:
            with _unclaimed(self._results / "trials" / one.trial_id) as free:
                if not free or not one.path.is_dir():
                    continue
                aside = set_aside(one.path)
            shutil.rmtree(aside, ignore_errors=True)
            gone.append(one)
            if not any(one.path.parent.iterdir()):
                one.path.parent.rmdir()
        return gone

    def _stored(self, path: Path, step: int, kept: bool, why: str, wanted: tuple[float, ...]) -> Stored:
        try:
            key = (path, path.stat().st_mtime_ns)
            if key not in self._sizes:
                with os.scandir(path) as entries:
                    self._sizes[key] = sum(entry.stat().st_size for entry in entries if entry.is_file())
            size = self._sizes[key]
        except OSError:  # it has just been renamed
            size = 0
        return Stored(path, path.parent.name, step, size, kept, why, wanted)

    def _reasons(self) -> dict[str, str]:
        """trial id -> why the last checkpoint of this trial, which has ended, is kept."""
        search = self._board.of_stage("search")
        found = {one: f"on the Pareto front of {' and '.join(objectives.of(self._sweep))}" for one in self._front()}
        for rung, at in reversed(self._rungs().items()):
            if at:
                found.setdefault(min(at, key=lambda name: (at[name], name)), f"the best at rung {rung:,.0f}")
        for row, _ in chances.candidates(self._board, self._sweep.asha) if self._sweep.asha else ():
            found.setdefault(row.trial_id, "it may get a second chance")
        for best in views.best(search):
            found.setdefault(best["trials"][0], f"the best of {best['method']}")
        for row in self._board.rows.values():
            if row.stage == "confirm":
                found[row.trial_id] = "a confirmed result"
            elif row.method == "dense":
                found.setdefault(row.trial_id, "the dense baseline")
            if row.state == "FAILED" or row.stopped_by:
                found[row.trial_id] = f"`raysparse retry` goes on from it: {row.state.lower()}"
        return found

    def _front(self) -> list[str]:
        points, unknown = {}, []
        for row in self._board.of_stage("search"):
            if row.state == "COMPLETED":
                known = self._costs.get(row.trial_id) or objectives.recorded_costs(self._results, row.trial_id)
                self._costs[row.trial_id] = known
                point = objectives.values(row, objectives.of(self._sweep), known)
                if point is None:  # its record cannot be read: kept rather than lost
                    unknown.append(row.trial_id)
                else:
                    points[row.trial_id] = point
        return [*objectives.front(points), *unknown]

    def _rungs(self) -> dict[float, dict[str, float]]:
        if self._sweep.asha is None:
            return {}
        total_steps = max((row.total_steps for row in self._board.rows.values()), default=0)
        return views.rungs(self._board, self._sweep.asha, total_steps)


class Budget:
    """The driver's side: asked between two steps of its loop, it removes what is spare while there is too much."""

    def __init__(self, results: Path, ledger: Ledger, sweep: Sweep) -> None:
        self._ledger, self._limit = ledger, sweep.storage.checkpoints
        self._store = Store(results, ledger.board, sweep)
        self._look_at = 0.0
        self._said: set[str] = set()

    def keep(self) -> None:
        """Bring the checkpoints below the budget, or say once that all of them are needed."""
        if self._limit is None or time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + LOOK_S
        stored = self._store.survey(driven=True)
        excess = sum(one.size_bytes for one in stored) - self._limit
        if excess <= 0:
            return
        excess -= self._free(stored, excess)
        limit = f"storage.checkpoints {size_text(self._limit)}"
        if excess > 0:
            self._say("needed", f"checkpoints that are needed take {size_text(excess + self._limit)}, over {limit}: "
                      "they are kept; what they are for: raysparse gc DIR --dry-run")  # fmt: skip
        else:
            self._say("full", f"{limit} is reached: spare checkpoints are removed from now on")

    def make_room(self) -> int:
        """Remove all that is spare. -> bytes."""
        freed = self._free(self._store.survey(driven=True), float("inf"))
        if freed:
            self._say("room", f"--max-disk is reached: spare checkpoints go first, {size_text(freed)} now")
        return freed

    def _free(self, stored: Sequence[Stored], wanted_bytes: float) -> int:
        """Remove spare ones, least wanted first, until so many bytes are free. -> bytes."""
        freed = 0
        for one in sorted((one for one in stored if not one.kept), key=lambda one: one.wanted):
            if freed >= wanted_bytes:
                break
            try:
                freed += sum(gone.size_bytes for gone in self._store.remove([one]))
            except OSError as error:  # a mount that is lost for a while: the next look tries again
                self._say("failed", f"a checkpoint could not be removed: {error}")
                break
        return freed

    def _say(self, key: str, reason: str) -> None:
        if key not in self._said:
            self._said.add(key)
            self._ledger.add(event("note", stage=self._ledger.board.stage, reason=reason))


def facts(stored: Sequence[Stored]) -> list[dict[str, Any]]:
    """As plain data."""
    names = ("trial_id", "step", "size_bytes", "why")
    return [{name: getattr(one, name) for name in names} | {"path": str(one.path)} for one in stored]


def _judged(row: Row | None, place: int, reason: str | None) -> tuple[bool, str]:
    """Whether a checkpoint is kept, and why. place: 1 for the last of its trial."""
    if row is None:
        return True, "not of a trial of this sweep"
    if row.open:
        return place <= OF_OPEN, "the trial is open and goes on from it" if place <= OF_OPEN else "an older one"
    if place > 1:
        return False, f"not the last: the trial has {row.state.lower()}" if row.state != "STOPPED" else "not the last"
    return reason is not None, reason or f"{row.state.lower()} at step {row.step:,}, and none of the best"


def _folders(parent: Path) -> list[Path]:
    try:
        with os.scandir(parent) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return []


@contextmanager
def _unclaimed(trial: Path) -> Iterator[bool]:
    """Whether no process trains the trial (train/claims.py), and none can begin to in this block: keep it short."""
    if not trial.is_dir():
        yield True
        return
    with (trial / "lock").open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
