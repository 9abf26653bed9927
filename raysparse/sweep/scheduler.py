"""ASHA on the FID in optimizer steps, with rungs that outlive the driver, and the one place that ends a trial.

Tune asks the scheduler first about every report, before the searcher and the callbacks hear of it. So the decision and
the report go to the journal here, as one line, and what follows only repeats it.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from raysparse.asha import Asha
from raysparse.sweep import pulse
from raysparse.sweep.board import Ledger, Row
from raysparse.sweep.journal import event

# Not at the rungs, so never stopped: all else is compared with it at full budget. Were it there, a dense model that
# learns faster at first would have every sparse trial stopped (seen: no sparse trial of ten was completed).
BASELINE = "dense"
FIDS = ("fid", "intermediate_fid")  # of a report


class Rung(dict[str, float]):
    """Trial id -> -FID, with the values in order as well: Ray sorts them anew for every report."""

    def __init__(self) -> None:
        super().__init__()
        self._ordered: list[float] = []

    def __setitem__(self, trial_id: str, value: float) -> None:
        """A trial's one value."""
        super().__setitem__(trial_id, value)
        bisect.insort(self._ordered, value)

    def place(self, value: float) -> int:
        """1 for a value that no other one exceeds."""
        return len(self._ordered) - bisect.bisect_right(self._ordered, value) + 1

    def cutoff(self, reduction_factor: float) -> float | None:
        """What Ray's bracket says, numpy's percentile to the last bit; None where nobody was here yet."""
        if not self._ordered:
            return None
        position = (len(self._ordered) - 1) * ((1 - 1 / reduction_factor) * 100 / 100)
        low, share = int(position), position - int(position)
        below, above = self._ordered[low], self._ordered[min(low + 1, len(self._ordered) - 1)]
        step = above - below
        return above - step * (1 - share) if share >= 0.5 else below + step * share


class Rungs(AsyncHyperBandScheduler):  # type: ignore[misc]
    """Asynchronous successive halving (Li et al. 2020) with Ray's cutoffs, rebuilt from the journal.

    A trial counts once at a rung, with its first FID at or after the rung's step. Ray would also compare a late FID at
    the lower rungs that the trial has jumped over. Without `asha` every trial runs to its end.
    """

    def __init__(
        self,
        ledger: Ledger,
        stage: str,
        total_steps: int,
        asha: Asha | None,
        asked_to_stop: Callable[[str], str | None] = lambda trial_id: None,
    ) -> None:
        """asked_to_stop: the person who asked for the end of a trial, None where nobody did."""
        super().__init__(
            time_attr="step",
            metric="fid",
            mode="min",
            max_t=total_steps,
            grace_period=total_steps,
            reduction_factor=asha.reduction_factor if asha else 2,
        )
        self._ledger, self._stage, self._asked_to_stop = ledger, stage, asked_to_stop
        self._explore_first = asha.explore_first if asha else False
        steps = asha.rung_steps(total_steps) if asha else []
        self._brackets[0]._rungs = self._rungs = [(step, Rung()) for step in reversed(steps)]  # the highest first
        for row in ledger.board.of_stage(stage):
            for step, fid in sorted(row.fids.items()):
                rung = self._rung(row.trial_id, step)
                if rung is not None and fid is not None and step < total_steps:
                    rung[1][row.trial_id] = -fid

    @property
    def rungs(self) -> dict[float, dict[str, float]]:
        """step of the rung -> trial id -> FID."""
        return {step: {name: -value for name, value in at.items()} for step, at in self._rungs}

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """There is one bracket; Ray draws one of them, by numpy's own seed, for each trial."""
        self._trial_info[trial.trial_id] = self._brackets[0]

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        row = self._row(trial)
        if not row.open:  # a worker that was restarted after the decision
            return str(TrialScheduler.STOP)
        if result.get("note"):
            self._add("note", row, reason=result["note"])
            return str(TrialScheduler.CONTINUE)
        step = int(result["step"])
        if result.get("failed"):
            self._add("failed", row, step=step if result.get("diverged") else None, reason=result["failed"])
            return str(TrialScheduler.STOP)
        if step <= row.step:  # a restarted worker says again what is known
            return str(TrialScheduler.CONTINUE)
        return self._decide(row, step, {name: result[name] for name in FIDS if result.get(name) is not None})

    def _decide(self, row: Row, step: int, fids: dict[str, float]) -> str:
        """fids: what the report has of FIDS; the trial is compared by its intermediate one where it has one."""
        fid = float(fids["intermediate_fid" if row.intermediate else "fid"])
        if step >= row.total_steps:
            self._add("completed", row, step=step, **fids)
            return str(TrialScheduler.STOP)
        found = self._rung(row.trial_id, step)
        if found is not None:
            milestone, rung = found
            cutoff = rung.cutoff(self._reduction_factor)
            rung[row.trial_id] = -fid
            place = rung.place(-fid)
            why = None
            if self._explore_first and rung is self._rungs[-1][1]:  # who comes there late, too
                why = "the best of all go on when the search has no new trial"
            elif self._explore_first and place > len(rung) / self._reduction_factor:
                why = f"not among the best 1 in {self._reduction_factor:g}"
            elif not self._explore_first and cutoff is not None and -fid < cutoff:
                name = "intermediate FID" if row.intermediate else "FID"
                why = f"{name} {fid:.4g} above the cutoff {-cutoff:.4g}"
            if why:
                self._num_stopped += 1
                reason = f"place {place} of {len(rung)} at step {milestone:g}: {why}"
                self._add("stopped", row, step=step, reason=reason, **fids)
                return str(TrialScheduler.STOP)
        by = self._asked_to_stop(row.trial_id)
        if by is not None:  # after the rung has its FID: a rebuilt rung, made from the journal, has it too
            self._add("stopped", row, step=step, reason=f"by {by} at step {step}", by=by, **fids)
            return str(TrialScheduler.STOP)
        self._add("report", row, step=step, **fids)
        return str(TrialScheduler.CONTINUE)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        row = self._row(trial)
        if not row.open:
            return
        results = self._ledger.board.folder
        hung = pulse.hung(results / "trials" / row.trial_id) if results else None
        reason = hung or lost_because(trial)
        if trial.should_recover():
            self._add("note", row, reason=f"{reason}; started again")
        else:
            self._add("failed", row, reason=reason)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        row = self._row(trial)
        if row.open:
            self._add("failed", row, reason=f"it ended at step {row.step} of {row.total_steps} without a last report")

    def _row(self, trial: Trial) -> Row:
        return self._ledger.board.rows[trial.config["trial_id"]]

    def _add(self, kind: Any, row: Row, **fields: Any) -> None:
        self._ledger.add(event(kind, stage=self._stage, trial_id=row.trial_id, **fields))

    def _rung(self, trial_id: str, step: int) -> tuple[float, Rung] | None:
        """The highest rung at or below `step`, where the trial has no value there yet; none for the dense baseline."""
        if self._ledger.board.rows[trial_id].method == BASELINE:
            return None
        for milestone, at in self._rungs:
            if step >= milestone:
                return None if trial_id in at else (milestone, at)
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {}  # for Tune's snapshots, which nothing reads


def lost_because(trial: Trial) -> str:
    """How a trial lost its process: in its own words, where it had the time for some, else in Ray's."""
    try:
        text = Path(trial.error_file).read_text(encoding="utf-8")
    except OSError:
        return "its process was lost: Ray does not say why"
    left = last_line(text).partition("NodeGoes: ")[2]
    return left or f"its process was lost: {exit_detail(text)}"


def exit_detail(error: str) -> str:
    """Of Ray's error about a process that ended: the part that says how."""
    if "running low on memory" in error:
        used = re.search(r"was (\S+ used / \S+ limit)", error)
        return "Ray killed it because memory ran low" + (f" ({used[1]})" if used else "")
    if "Worker exit detail:" not in error and "is unavailable" in error:
        return "neither it nor its node answers"  # Ray says it in 400 letters of RPC
    return last_line(error.rpartition("Worker exit detail:")[2].partition(" Some common causes")[0]).rstrip(".")


def last_line(error: BaseException | str) -> str:
    """The last line that says something, of an exception or its text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
