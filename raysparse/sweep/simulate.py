"""A sweep in virtual time: the real scheduler, searcher, board and confirm stage over learning curves, without Ray.

What Tune does between them is repeated here, call by call, in the order of its controller: a free slot asks the
searcher, the scheduler hears of the new trial, each report goes to the scheduler first and, unless it stops the trial,
to the searcher; the end of a trial goes to both. Trials report in the order of their virtual clocks; ties go to the
trial that was started first. Two runs with the same arguments make the same calls.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from optuna.storages import BaseStorage
from ray.tune.schedulers import TrialScheduler

from raysparse import rng, space
from raysparse.errors import UsageError
from raysparse.space import Point, Sweep
from raysparse.sweep import tuner
from raysparse.sweep.axes import all_points
from raysparse.sweep.board import Board, Ledger, Row
from raysparse.sweep.curves import Curve, Curves
from raysparse.sweep.journal import Event, event
from raysparse.sweep.scheduler import Rungs
from raysparse.sweep.search import Listed, Suggested, TuneConfig

Target = Callable[[Row], bool]
MOST_TRIALS, MOST_WORKERS = 10_000, 1_000


@dataclasses.dataclass(frozen=True)
class Pace:
    """How long things take in virtual time."""

    step_s: float = 1.0
    evaluation_s: float = 0.0
    last_evaluation_s: float | None = None  # of the one at a trial's last step; None: as the others
    jitter: float = 0.05  # standard deviation of log seconds between trials: machines are not all alike


@dataclasses.dataclass(frozen=True)
class Simulated:
    """How a simulated sweep went."""

    board: Board
    search_steps: int  # optimizer steps of the search stage
    confirm_steps: int
    full_steps: int  # of the search stage's trials, had each run to its end
    best_fid: float | None  # of the completed trials of the search
    stopped_at: dict[int, int]  # step -> trials of the search that were stopped there
    found_steps: tuple[int | None, ...]  # per target: steps of the search until a completed trial met it; None: never
    hours: float  # virtual, both stages
    decisions: int  # reports, suggestions and ends that the driver handled
    driver_cpu_s: float  # CPU seconds in the scheduler, the searcher and the ledger

    @property
    def spent_share(self) -> float:
        """Of the steps that the search would take without stopping."""
        return self.search_steps / self.full_steps

    def states(self) -> dict[str, int]:
        """state -> trials of the search."""
        found = [row.state for row in self.board.of_stage("search")]
        return {state: found.count(state) for state in sorted(set(found))}


def simulate(
    sweep: Sweep,
    curves: Curves,
    *,
    workers: int,
    world: int = 0,
    pace: Pace | None = None,
    targets: Sequence[Target] = (),
    journal: Path | None = None,
    storage: BaseStorage | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Simulated:
    """Walk a sweep's stages with `workers` trials at a time.

    world: which of the curves' possible worlds; targets: what counts as found, asked of each completed trial of the
    search, which ends where all are met; journal: an empty folder for a real journal, fsynced as in a sweep, None for
    none; storage: of the Optuna study, None for memory.
    UsageError for more than 10,000 trials or 1,000 workers.
    """
    if not 1 <= workers <= MOST_WORKERS:
        raise UsageError(f"a simulation takes 1 to {MOST_WORKERS:,} workers, got {workers:,}")
    if space.trial_count(sweep) > MOST_TRIALS:
        raise UsageError(f"a simulation takes at most {MOST_TRIALS:,} trials, got {space.trial_count(sweep):,}")
    ledger = Ledger(journal, on_event) if journal else Unwritten(on_event)
    try:
        run = _Run(sweep, curves, ledger, workers, world, pace or Pace(), targets, storage)
        for stage in ("search", *(["confirm"] if sweep.confirm else [])):
            run.walk(stage)
        return run.outcome()
    finally:
        ledger.close()


def grid_fids(sweep: Sweep, curves: Curves, world: int = 0) -> dict[str, float]:
    """trial id -> FID at full budget of every point of a sweep of lists, as a grid without stopping would find it.

    UsageError where an axis is a range.
    """
    points: list[Point] | None = all_points(sweep.search) if sweep.search else space.grid_points(sweep)
    if points is None:
        raise UsageError(f"{sweep.name} has an axis that is a range: it has no full grid")
    trials = [space.trial(sweep, point) for point in points]
    return {
        trial.trial_id: curves.curve(trial.trial_id, trial.model_dump(mode="json"), world)[-1][1] for trial in trials
    }


def in_world(sweep: Sweep, world: int) -> Sweep:
    """The sweep with the sampler's seed of this world, so that a spread over worlds has the sampler's part in it."""
    if sweep.search is None:
        return sweep
    return sweep.model_copy(update={"search": sweep.search.model_copy(update={"seed": sweep.search.seed + world})})


class Unwritten(Ledger):
    """A ledger without a journal."""

    def __init__(self, on_event: Callable[[Event], None] | None = None) -> None:
        self.board = Board()
        self._on_event = on_event

    def add(self, item: Event) -> None:
        self.board.apply(item)
        if self._on_event:
            self._on_event(item)

    def close(self) -> None:
        """Nothing is open."""


@dataclasses.dataclass
class _Running:
    """A trial in its slot. It has done `step` steps at time `since` and reports `curve[at]` at time `until`."""

    trial: Any  # what the scheduler touches of a Tune trial: trial_id, config
    curve: Curve
    slowness: float
    since: float
    until: float
    step: int = 0
    at: int = 0


class _Run:
    """One simulation: the clock, the slots and the tallies."""

    def __init__(
        self,
        sweep: Sweep,
        curves: Curves,
        ledger: Ledger,
        workers: int,
        world: int,
        pace: Pace,
        targets: Sequence[Target],
        storage: BaseStorage | None,
    ) -> None:
        self._sweep, self._curves, self._ledger, self._workers = sweep, curves, ledger, workers
        self._world, self._pace, self._targets, self._storage = world, pace, targets, storage
        self._now = 0.0
        self._cpu_s, self._decisions, self._started = 0.0, 0, 0
        self._steps = {"search": 0, "confirm": 0}
        self._found_steps: list[int | None] = [None] * len(targets)

    def walk(self, stage: str) -> None:
        """One stage to its end."""
        with self._driver():
            tuner._plan(stage, self._sweep, self._ledger)
            asha = self._sweep.asha if stage == "search" else None
            scheduler = Rungs(self._ledger, stage, space.parsed_base(self._sweep).train.steps, asha)
            searcher: Any = (
                Listed(self._ledger, stage, _config_of, asha)
                if stage == "confirm" or self._sweep.search is None
                else Suggested(self._sweep, self._ledger, _config_of, self._storage)
            )
        queue: list[tuple[float, int, _Running]] = []
        more = True
        while more or queue:
            while more and len(queue) < self._workers:
                with self._driver():
                    config = searcher.suggest(f"{stage}-{self._started}")
                if config is None and queue:  # not now
                    break
                more = config is not None and config != searcher.FINISHED
                if more:
                    running = self._start(stage, scheduler, config)
                    heapq.heappush(queue, (running.until, self._started, running))
            if queue:
                self._now, number, running = heapq.heappop(queue)
                if self._report(stage, scheduler, searcher, running):
                    heapq.heappush(queue, (running.until, number, running))
                self._look(stage, running, queue)
                if self._targets and None not in self._found_steps:
                    return

    def outcome(self) -> Simulated:
        rows = self._ledger.board.of_stage("search")
        completed = [row.fid for row in rows if row.state == "COMPLETED" and row.fid is not None]
        stopped = sorted(row.step for row in rows if row.state == "STOPPED")
        return Simulated(
            board=self._ledger.board,
            search_steps=self._steps["search"],
            confirm_steps=self._steps["confirm"],
            full_steps=sum(row.total_steps for row in rows),
            best_fid=min(completed, default=None),
            stopped_at={step: stopped.count(step) for step in dict.fromkeys(stopped)},
            found_steps=tuple(self._found_steps),
            hours=self._now / 3600,
            decisions=self._decisions,
            driver_cpu_s=self._cpu_s,
        )

    def _start(self, stage: str, scheduler: Rungs, config: TuneConfig) -> _Running:
        """What the searcher has suggested, in a slot; from the last report, where it had one."""
        trial = SimpleNamespace(trial_id=f"{stage}-{self._started}", config=config)
        row = self._ledger.board.rows[config["trial_id"]]
        with self._driver():
            scheduler.on_trial_add(None, trial)
            self._ledger.add(event("started", stage=stage, trial_id=row.trial_id, step=row.step))
            self._decisions -= 1  # counted with its suggestion
        self._started += 1
        draw = rng.numpy_generator(self._world, f"pace {row.trial_id}").standard_normal()
        running = _Running(
            trial=trial,
            curve=self._curves.curve(row.trial_id, row.config, self._world),
            slowness=math.exp(self._pace.jitter * draw),
            since=self._now,
            until=self._now,
            step=row.step,
            at=len(row.fids),
        )
        self._go_on(running)
        return running

    def _go_on(self, running: _Running) -> None:
        """To the next report."""
        steps = running.curve[running.at][0] - running.step
        running.since = self._now
        pace, evaluation_s = self._pace, self._pace.evaluation_s
        if pace.last_evaluation_s is not None and running.at + 1 == len(running.curve):
            evaluation_s = pace.last_evaluation_s
        running.until = self._now + running.slowness * (steps * pace.step_s + evaluation_s)

    def _report(self, stage: str, scheduler: Rungs, searcher: Any, running: _Running) -> bool:
        """One report of a trial through the driver, as Tune's controller does it; whether the trial goes on."""
        step, fid = running.curve[running.at]
        self._steps[stage] += step - running.step
        running.step, running.at = step, running.at + 1
        trial = running.trial
        row = self._ledger.board.rows[trial.config["trial_id"]]
        result: dict[str, Any] = {"step": step, "fid": fid}
        if row.intermediate:  # a curve is of one protocol: its end stands for the FID under the other one
            result |= {"intermediate_fid": fid, "fid": fid if step >= row.total_steps else None}
        with self._driver():
            decision = scheduler.on_trial_result(None, trial, result)
            if decision != TrialScheduler.STOP:
                searcher.on_trial_result(trial.trial_id, result)
            else:
                scheduler.on_trial_complete(None, trial, result)
                searcher.on_trial_complete(trial.trial_id, result)
        if decision == TrialScheduler.STOP:
            return False
        self._go_on(running)
        return True

    def _look(self, stage: str, ended: _Running, queue: list[tuple[float, int, _Running]]) -> None:
        """Which targets have just been met, and what had been spent by then, half-done intervals included."""
        row = self._ledger.board.rows[ended.trial.config["trial_id"]]
        if stage != "search" or row.state != "COMPLETED":
            return
        for number, target in enumerate(self._targets):
            if self._found_steps[number] is None and target(row):
                self._found_steps[number] = self._steps["search"] + round(
                    sum(_done(one, self._now) for _, _, one in queue)
                )

    @contextmanager
    def _driver(self) -> Iterator[None]:
        """What happens in here is the driver's work and on its account."""
        start = time.process_time()
        yield
        self._cpu_s += time.process_time() - start
        self._decisions += 1


def _done(running: _Running, now: float) -> float:
    """Steps done since the last report."""
    share = (now - running.since) / (running.until - running.since) if running.until > running.since else 0.0
    return share * (running.curve[running.at][0] - running.step)


def _config_of(row: Row) -> TuneConfig:
    return {"trial_id": row.trial_id, **row.point}
