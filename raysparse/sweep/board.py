"""The table of trials: what the events say so far. The sweep decides by it, the command line shows it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raysparse.sweep.journal import Event, Journal, read


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
    fids: dict[int, float | None] = dataclasses.field(default_factory=dict)  # step -> FID
    reason: str | None = None
    number: int | None = None  # of the Optuna trial

    @property
    def step(self) -> int:
        """The last step with a report, 0 before the first."""
        return max(self.fids, default=0)

    @property
    def fid(self) -> float | None:
        """At the last report."""
        return self.fids[self.step] if self.fids else None

    @property
    def open(self) -> bool:
        """Not at its end: a resumed sweep goes on with it."""
        return self.state in ("PENDING", "RUNNING")

    def setting(self, name: str) -> Any:
        """A setting of the method, e.g. "sparsity"; None where it has none."""
        return self.config["sparse"].get(name)


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
        self.chosen: list[Event] = []
        self.stage: str | None = None
        self.finished = False

    @classmethod
    def load(cls, results: Path) -> Board:
        """The table of a sweep that runs, was interrupted, or is finished."""
        board = cls()
        for item in read(results / "journal.jsonl"):
            board.apply(item)
        return board

    def apply(self, item: Event) -> None:
        row = self.rows.get(item.trial_id or "")
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
                )
            case "repeated":
                assert item.trial_id is not None
                assert item.number is not None
                self.repeats.append(Repeat(item.number, item.trial_id))
            case "started" if row:
                row.state = "RUNNING"
            case "report" | "stopped" | "completed" | "failed" if row:
                row.state = {"report": "RUNNING"}.get(item.kind, item.kind.upper())
                row.reason = item.reason
                if item.step is not None:
                    row.fids[item.step] = item.fid
            case "chosen":
                self.chosen.append(item)
            case "stage":
                self.stage = item.stage
            case "finished":
                self.finished = True
            case _:
                pass

    def of_stage(self, stage: str) -> list[Row]:
        return [row for row in self.rows.values() if row.stage == stage]

    def counts(self) -> dict[str, int]:
        """state -> number of trials."""
        states = [row.state for row in self.rows.values()]
        return {state: states.count(state) for state in dict.fromkeys(states)}


class Ledger:
    """The journal and the board together: an event is on disk before anything acts on it."""

    def __init__(self, results: Path, on_event: Callable[[Event], None] | None = None) -> None:
        self.board = Board.load(results)
        self._journal = Journal(results / "journal.jsonl")
        self._on_event = on_event

    def add(self, item: Event) -> None:
        self._journal.append(item)
        self.board.apply(item)
        if self._on_event:
            self._on_event(item)

    def close(self) -> None:
        self._journal.close()
