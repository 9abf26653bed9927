"""The sweep's journal: one JSON line per event, fsynced. It is the one truth that a killed sweep is rebuilt from.

Everything else is a projection that can be made again from it: the table of trials (`board`), ASHA's rungs
(`scheduler`), the Optuna study (`search`), the state columns of the records. Ray's own snapshots are periodic, forget
the scheduler and are pickles; a line here is written before anything acts on it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from raysparse.errors import UsageError
from raysparse.sweep.patience import patiently

Kind = Literal[
    "stage",  # `stage` begins; reason: in words
    "planned",  # a new trial: method, point, seed, total_steps, config
    "repeated",  # the search asked for a point again: nothing is trained, the known result counts
    "refused",  # the search drew a point whose settings do not go together: no trial; reason
    "started",  # a worker began, or went on from `step`
    "report",  # an evaluation: step and fid, or intermediate_fid
    "stopped",  # an evaluation after which ASHA stopped the trial at this rung; reason: its FID and the cutoff; or a
    #             person stopped it: `by` says who
    "completed",  # the last evaluation
    "failed",  # diverged, raised or lost; reason
    "reopened",  # a person asked for a trial again that had failed or been stopped by a person; `by` and reason
    "second_chance",  # a trial that ASHA stopped goes on, the search being over; reason
    "accepted",  # the sweep goes on under another file, code or version; reason: the differences
    "chosen",  # confirm: a winner of the search; reason: why
    "note",  # something to know; reason
    "interrupted",  # Ctrl-C or SIGTERM; `raysparse resume` goes on
    "gone",  # the driver before ended without a word, as who writes next has seen: none of its trials runs; reason
    "finished",  # every trial of every stage has ended
]


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happened in a sweep. Fields that a kind does not have are None."""

    kind: Kind
    time: float  # seconds since 1970
    stage: str | None = None  # search or confirm
    trial_id: str | None = None
    step: int | None = None
    fid: float | None = None  # under the trial's own protocol
    intermediate_fid: float | None = None  # under its intermediate one, where it has one
    reason: str | None = None
    method: str | None = None
    point: dict[str, Any] | None = None  # planned, repeated, refused: the axes' values
    seed: int | None = None
    total_steps: int | None = None
    config: dict[str, Any] | None = None  # planned: the whole TrialConfig
    number: int | None = None  # planned, repeated, refused, second_chance in a search: the Optuna trial's number
    costs: dict[str, float] | None = None  # planned, where the search has several objectives; see objectives.py
    by: str | None = None  # stopped, reopened: the person, USER@HOST


def event(kind: Kind, **fields: Any) -> Event:
    """An event of now."""
    return Event(kind, time.time(), **fields)


class Journal:
    """Append-only; one writer. A line cut off by a kill or a full disk is dropped when the journal is opened again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        whole = _whole_bytes(path)
        if whole is not None and whole < path.stat().st_size:
            os.truncate(path, whole)
        self._stream = path.open("ab")

    def append(self, item: Event) -> None:
        line = {name: value for name, value in vars(item).items() if value is not None}
        self._stream.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        patiently(self._flush, "journal", needed=True)

    def _flush(self) -> None:
        self._stream.flush()  # tried again it goes on behind the bytes that were written
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()


def read(path: Path) -> Iterator[Event]:
    """The events of a journal, also while it grows. UsageError naming a line that is damaged."""
    return iter(Reader(path).fresh())


class Reader:
    """Follows a journal as another process, or another machine, appends to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = self._lines = 0

    def fresh(self) -> Iterator[Event]:
        """The whole lines that came since the last call. UsageError naming a line that is damaged."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as stream:
            stream.seek(self._bytes)
            for line in stream:
                if not line.endswith(b"\n"):  # being written, or cut off
                    return
                self._bytes, self._lines = self._bytes + len(line), self._lines + 1
                try:
                    data = json.loads(line)
                    item = Event(**{name: value for name, value in data.items() if name in _FIELDS})
                    _check(item)
                    yield item
                except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
                    raise UsageError(
                        f"{self.path}, line {self._lines} is damaged: restore the file from a copy ({error})"
                    ) from error


_TRIAL_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_FIELDS = {field.name for field in dataclasses.fields(Event)}
_TYPES: dict[type, tuple[str, ...]] = {
    str: ("kind", "stage", "trial_id", "reason", "method", "by"),
    int: ("step", "seed", "total_steps", "number"),
    float: ("time", "fid", "intermediate_fid"),
    dict: ("point", "config", "costs"),
}
_NEEDED = {  # what the board cannot do without
    "planned": ("stage", "trial_id", "method", "config"),
    "repeated": ("trial_id", "number"),
    "refused": ("number",),
}
_SECTIONS = ("sparse", "data", "evaluate", "first_stage")  # of a trial's config, those that the board's readers look at
_END_OF_TIME = 1e11  # the year 5138: later ones are no dates in Python


def _check(item: Event) -> None:
    """ValueError where a field is not what readers take it for; kinds and fields of later versions are left alone."""
    for kind, names in _TYPES.items():
        for name in names:
            _check_type(name, getattr(item, name), kind)
    if missing := [name for name in ("kind", "time", *_NEEDED.get(item.kind, ())) if getattr(item, name) is None]:
        raise ValueError(f"it has no {', '.join(missing)}")
    if not 0 <= item.time < _END_OF_TIME:
        raise ValueError(f"time {item.time} is no date")
    if item.trial_id is not None and not _TRIAL_ID.fullmatch(item.trial_id):
        raise ValueError(f"{item.trial_id!r} is no trial's id")  # it names folders: no way out of ours
    if item.point and type(item.point.get("method")) is not str:
        raise ValueError("the point has no method")
    for name in _SECTIONS:
        _check_type(f"config.{name}", (item.config or {}).get(name), dict)
    for name, value in (item.costs or {}).items():
        _check_type(f"costs.{name}", value, float)


def _check_type(name: str, value: Any, kind: type) -> None:
    # `type`, for True is an int to isinstance; isfinite raises where an int is no float.
    if value is None or type(value) is kind or (kind is float and type(value) is int and math.isfinite(value)):
        return
    raise ValueError(f"{name} is {type(value).__name__}, not {kind.__name__}")


def _whole_bytes(path: Path) -> int | None:
    """Bytes up to and with the last line end; None where there is no file."""
    if not path.is_file():
        return None
    return path.read_bytes().rfind(b"\n") + 1
