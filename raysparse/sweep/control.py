"""What a person asks of a sweep, from any machine that sees its folder: stop a trial, try trials again; and who drives.

A driver that runs is told by a file, RESULTS/requests/<id>.stop, and looks when the trial reports. Where none runs, the
journal itself is written, with the driver's lock held.
"""

from __future__ import annotations

import dataclasses
import getpass
import os
import platform
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from raysparse import results as records
from raysparse.errors import UsageError
from raysparse.files import write_text
from raysparse.results import Facts, Outcome
from raysparse.sweep import folder
from raysparse.sweep.board import Board, Ledger, Row
from raysparse.sweep.journal import event

HEARTBEAT_S = 10.0  # so often a driver touches its lock
SILENT_S = 60.0  # without one for so long, a driver on another machine counts as gone


@dataclasses.dataclass(frozen=True)
class Driver:
    """The process that drives a sweep, as far as it can be seen from here."""

    state: Literal["running", "gone", "none"]  # none: it ended in order, or there never was one
    who: str  # "process 12 on host"


def driver(results: Path, board: Board | None = None) -> Driver:
    """Who drives the sweep: told by the process where it is this machine's, else by how fresh its heartbeat is.

    board: the sweep's, where it is known; else it is read.
    """
    lock = results / "lock"
    try:
        who, beat = lock.read_text(encoding="utf-8", errors="replace").strip(), lock.stat().st_mtime
    except OSError:
        return Driver("none", "")
    last = (board or Board.load(results)).last
    ended = last is None or last.kind in ("finished", "interrupted")
    words = who.split()  # process PID on HOST
    if len(words) == 4 and words[3] == platform.node() and words[1].isdigit():
        alive = _holds(int(words[1]), lock)
    else:
        alive = not ended and time.time() - beat < SILENT_S
    if alive:
        return Driver("running", who)
    return Driver("none" if ended else "gone", who)


def beat(results: Path) -> None:
    """The driver's sign of life."""
    try:
        os.utime(results / "lock")
    except OSError:
        return  # a full or absent disk shows elsewhere


def stop(results: Path, trial_id: str) -> str:
    """Ask for the end of a trial. -> what will happen, in words. UsageError where it has ended, or nothing can be
    written in the folder."""
    with _writing(results):
        return _stop(results, trial_id)


def _stop(results: Path, trial_id: str) -> str:
    row = _row(results, trial_id)
    if not row.open:
        raise UsageError(
            f"trial {row.trial_id} has ended: {row.state.lower()}" + (f", {row.reason}" * bool(row.reason))
        )
    by = person()
    try:
        with alone(results):
            ledger = Ledger(results)
            try:
                current = ledger.board.rows[trial_id]
                if current.open:
                    reason = f"by {by} at step {current.step}, while no driver ran"
                    ledger.add(event("stopped", stage=row.stage, trial_id=trial_id, reason=reason, by=by))
                rewrite_record(results, current)
            finally:
                ledger.close()
        return "stopped; no driver runs, so at once"
    except folder.Busy:
        write_text(request_path(results, trial_id), by + "\n")
    when = "after its first report" if row.state == "PENDING" else "at its next report"
    return f"asked for: the driver ends it {when} (now at step {row.step} of {row.total_steps})"


def stop_asked_by(results: Path, trial_id: str) -> str | None:
    """The person who asked for the trial's end; None where nobody did."""
    try:
        return request_path(results, trial_id).read_text(encoding="utf-8", errors="replace").strip()[:200] or "unknown"
    except OSError:
        return None


def request_path(results: Path, trial_id: str) -> Path:
    return results / "requests" / f"{trial_id}.stop"


def retry(results: Path, trial_ids: Sequence[str]) -> None:
    """Make trials open again that failed, or that a person stopped; `raysparse resume` runs them.

    UsageError while a driver runs, for a trial that may not be tried again, and where nothing can be written.
    """
    with _writing(results):
        _retry(results, trial_ids)


@contextmanager
def alone(results: Path) -> Iterator[None]:
    """The right to change a sweep's folder while nobody drives it. Busy where somebody does; UsageError where nothing
    can be written."""
    with _writing(results):
        _refuse_beside_a_driver(results)
        with folder.locked(results):
            yield


def _retry(results: Path, trial_ids: Sequence[str]) -> None:
    for trial_id in trial_ids:
        _check_retry(_row(results, trial_id))
    try:
        with alone(results):
            ledger = Ledger(results)
            try:
                for trial_id in trial_ids:
                    row = ledger.board.rows[trial_id]
                    _check_retry(row)
                    reason = f"was {row.state.lower()}: {row.reason}"
                    request_path(results, trial_id).unlink(missing_ok=True)
                    ledger.add(event("reopened", stage=row.stage, trial_id=trial_id, reason=reason, by=person()))
                    rewrite_record(results, row)
            finally:
                ledger.close()
    except folder.Busy as busy:
        quoted = shlex.quote(str(results))
        raise UsageError(
            f"{busy}; trials are tried again after it has ended (Ctrl-C there lets it go on later), with: "
            f"raysparse retry {quoted} --failed && raysparse resume {quoted}"
        ) from None


@contextmanager
def _writing(results: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write in {results}: {error}; this needs a user and a mount that may") from error


def rewrite_record(results: Path, row: Row) -> None:
    """Bring a trial's records to the row's state; of a trial that has none, the driver writes them."""
    path = results / "records" / f"{row.trial_id}.parquet"
    if not path.is_file():
        return
    table = records.read_trial(path)
    first = table.slice(0, 1).to_pylist()[0]
    facts = Facts(**{field.name: first[field.name] for field in dataclasses.fields(Facts)})
    records.write_table(path, facts, outcome_of(row), [r for r in records.reports_of(table) if r.step in row.fids])


def outcome_of(row: Row) -> Outcome:
    """Where a row stands, as its records say it."""
    return Outcome(
        state="RUNNING" if row.open else row.state,
        stopped_at_step=row.step if row.state == "STOPPED" and not row.stopped_by else None,
        state_reason=row.reason,
    )


def person() -> str:
    """USER@HOST."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        user = str(os.getuid())
    return f"{user}@{platform.node()}"


def _row(results: Path, trial_id: str) -> Row:
    rows = Board.load(results).rows
    if trial_id not in rows:
        raise UsageError(f"{results} has no trial {trial_id!r}; its trials: raysparse ls {shlex.quote(str(results))}")
    return rows[trial_id]


def _check_retry(row: Row) -> None:
    if row.state == "FAILED" or (row.state == "STOPPED" and row.stopped_by):
        return
    why = "the trial scheduler stopped it by its FID" if row.state == "STOPPED" else f"it is {row.state.lower()}"
    raise UsageError(
        f"trial {row.trial_id} is not one to try again: {why}; failed trials are, and those that a person stopped"
    )


def _refuse_beside_a_driver(results: Path) -> None:
    """Busy where a driver is seen: some shared file systems keep locks to one machine."""
    seen = driver(results)
    if seen.state == "running":
        raise folder.Busy(f"another process drives the sweep in {results}: {seen.who}")


def _holds(process: int, lock: Path) -> bool:
    """Whether a process of this machine has the lock open: its id alone may be another's by now."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's; its files cannot be seen
    try:
        return any(os.path.samefile(link, lock) for link in Path(f"/proc/{process}/fd").iterdir() if _is_file(link))
    except OSError:
        return True  # no /proc here, or another user's


def _is_file(link: Path) -> bool:
    try:
        return link.is_file()
    except OSError:
        return False
