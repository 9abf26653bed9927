"""The table of trials: what the events say so far. The sweep decides by it, the command line shows it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raysparse.sweep import leaving
from raysparse.sweep.journal import Event, Journal, event, read


@dataclasses.dataclass
class Row:
    """One trial as it stands."""

    trial_id: str
    stage: str  # search or confirm
    method: str
    point: dict[str, Any]  # the axes' values, `method` included
    seed: int
    total_steps: int
    config: dict[str, Any]  # the whole TrialConfig
    state: str = "PENDING"  # or RUNNING, COMPLETED, STOPPED, FAILED
    # step -> the FID by which trials are compared while they train, None where it was lost: under the intermediate
    # protocol of a trial that has one, at its last step too
    fids: dict[int, float | None] = dataclasses.field(default_factory=dict)
    result: float | None = None  # of a completed trial: its FID under its own protocol
    reason: str | None = None
    number: int | None = None  # of the Optuna trial
    costs: dict[str, float] = dataclasses.field(default_factory=dict)  # where there are several objectives
    stopped_by: str | None = None  # the person, where it was not ASHA
    busy_s: float = 0.0  # with its resources held, as far as is known; see `Board.busy_s`
    since: float | None = None  # it holds them now, since this time
    heard: float | None = None  # time of its last event

    @property
    def step(self) -> int:
        """The last step with a report, 0 before the first."""
        return max(self.fids, default=0)

    @property
    def latest(self) -> float | None:
        """Of `fids`, at the last report; to be compared with such values of the same step alone."""
        return self.fids[self.step] if self.fids else None

    @property
    def fid(self) -> float | None:
        """Under the trial's own protocol, at the last report: with an intermediate one, that of a completed trial."""
        return self.result if self.intermediate else self.latest

    @property
    def intermediate(self) -> bool:
        """Whether `fids` are of a protocol of their own."""
        return (self.config.get("evaluate") or {}).get("intermediate") is not None

    @property
    def open(self) -> bool:
        """Not at its end: a resumed sweep goes on with it."""
        return self.state in ("PENDING", "RUNNING")

    @property
    def diverged(self) -> bool:
        """Failed by its own numbers: the same settings would do it again."""
        return self.state == "FAILED" and bool(self.fids) and self.latest is None

    def setting(self, name: str) -> Any:
        """A setting of the method, e.g. "sparsity"; None where it has none."""
        return (self.config.get("sparse") or {}).get(name)


@dataclasses.dataclass(frozen=True)
class Repeat:
    """An Optuna trial whose point had a trial already."""

    number: int
    trial_id: str


class Board:
    """Folds events; `board.apply` can be handed to `run` as its `on_event`."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}  # trial id -> row, in the order of planning
        self.repeats: list[Repeat] = []
        self.refused: list[int] = []  # the Optuna trials whose points are no trials
        self.chosen: list[Event] = []
        self.chosen_before: set[str] = set()  # trial ids, of a changed sweep until it has finished: those chosen before
        self.second_chances = 0  # that were taken
        # Optuna trial -> its FIDs when ASHA had stopped it, where a second chance is another Optuna trial since
        self.pruned: dict[int, dict[int, float | None]] = {}
        self.stage: str | None = None
        self.finished = False
        self.folder: Path | None = None  # where its trials' files are
        self.first: Event | None = None
        self.last: Event | None = None

    @classmethod
    def load(cls, results: Path) -> Board:
        """The table of a sweep that runs, was interrupted, or is finished."""
        board = cls()
        board.folder = results
        for item in read(results / "journal.jsonl"):
            board.apply(item)
        return board

    def apply(self, item: Event) -> None:
        row = self.rows.get(item.trial_id or "")
        self._count_time(item, row)
        match item.kind:
            case "planned":
                assert item.trial_id is not None
                assert item.stage is not None
                assert item.method is not None
                assert item.config is not None
                self.rows[item.trial_id] = Row(
                    trial_id=item.trial_id,
                    stage=item.stage,
                    method=item.method,
                    point=item.point or {},
                    seed=item.seed or 0,
                    total_steps=item.total_steps or 0,
                    config=item.config,
                    number=item.number,
                    costs=item.costs or {},
                )
            case "repeated":
                assert item.trial_id is not None
                assert item.number is not None
                self.repeats.append(Repeat(item.number, item.trial_id))
            case "refused":
                assert item.number is not None
                self.refused.append(item.number)
            case "started" if row:
                row.state = "RUNNING"
            case "report" | "stopped" | "completed" | "failed" if row:
                row.state = {"report": "RUNNING"}.get(item.kind, item.kind.upper())
                row.reason = item.reason
                row.stopped_by = item.by
                if item.step is not None:
                    row.fids[item.step] = item.intermediate_fid if row.intermediate else item.fid
                if item.kind == "completed":
                    row.result = item.fid
            case "reopened" if row:
                row.state, row.reason, row.stopped_by = "PENDING", None, None
                row.fids = {step: fid for step, fid in row.fids.items() if fid is not None}  # where it was lost
                self.finished = False
            case "second_chance" if row:
                for number in self._numbers(row):
                    self.pruned.setdefault(number, dict(row.fids))
                row.state, row.reason = "PENDING", None
                self.second_chances += 1
                if item.number is not None:
                    self.repeats.append(Repeat(item.number, row.trial_id))
            case "chosen":
                self.chosen.append(item)
            case "stage":
                self.stage = item.stage
            case "finished":
                self.finished, self.chosen_before = True, set()
            case "accepted":
                # A changed sweep may have more to do, in its search too: then the event names no stage.
                self.finished, self.stage = False, item.stage
                if item.stage is None:
                    self.chosen_before = {str(each.trial_id) for each in self.chosen}
            case _:
                pass

    def busy_s(self, now: float | None = None) -> float:
        """Seconds in which trials held their resources, over all drivers; x GPUs per trial = GPU seconds.

        now: seconds since 1970, while a driver runs. None: up to the last event. What a killed driver's trials did
        after its last event is not known and not counted; nor is the pause after it, which the event `gone` ends.
        """
        until = now if now is not None else self.last.time if self.last else 0.0
        return sum(
            row.busy_s + (max(until - row.since, 0.0) if row.since is not None else 0.0) for row in self.rows.values()
        )

    def settle(self) -> None:
        """No trial runs: the driver that heard of them is gone."""
        for row in self.rows.values():
            _let_go(row, row.heard)

    def _count_time(self, item: Event, row: Row | None) -> None:
        self.first, self.last = self.first or item, item
        if item.kind == "interrupted":
            for each in self.rows.values():
                _let_go(each, item.time)
        elif item.kind == "gone":
            self.settle()
        elif row and item.kind == "started":
            _let_go(row, row.heard)  # of a process that was lost
            row.since = item.time
        elif row and item.kind in ("stopped", "completed", "failed"):
            _let_go(row, item.time)
        if row:
            row.heard = item.time

    def _numbers(self, row: Row) -> list[int]:
        """The Optuna trials of a row so far."""
        own = [] if row.number is None else [row.number]
        return own + [repeat.number for repeat in self.repeats if repeat.trial_id == row.trial_id]

    def of_stage(self, stage: str) -> list[Row]:
        return [row for row in list(self.rows.values()) if row.stage == stage]

    def counts(self) -> dict[str, int]:
        """state -> number of trials."""
        states = [row.state for row in list(self.rows.values())]  # a copy: a screen asks from its own thread
        return {state: states.count(state) for state in dict.fromkeys(states)}


def _let_go(row: Row, time: float | None) -> None:
    if row.since is not None:
        row.busy_s += max((time or row.since) - row.since, 0.0)
        row.since = None


class Ledger:
    """The journal and the board together: an event is on disk before anything acts on it.

    Opened by who alone may write: what runs by the journal then ran under a driver that was killed.
    """

    def __init__(self, results: Path, on_event: Callable[[Event], None] | None = None) -> None:
        self.board = Board.load(results)
        self._journal = Journal(results / "journal.jsonl")
        self._on_event = on_event
        running = [row.trial_id for row in self.board.rows.values() if row.since is not None]
        if running:  # on record: else who reads the journal counts the pause as time in which they ran
            for trial_id in running:
                leaving.forgive_start(results / "trials" / trial_id)
            self.add(event("gone", reason=f"the driver before ended without a word; {len(running)} trials ran"))

    def add(self, item: Event) -> None:
        self._journal.append(item)
        self.board.apply(item)
        if self._on_event:
            self._on_event(item)

    def close(self) -> None:
        self._journal.close()
