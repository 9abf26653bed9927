"""The driver's callback in Tune: keeps each trial's Parquet records as reports come in."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial

from raysparse import results as records
from raysparse.errors import UsageError
from raysparse.files import remove_leftovers
from raysparse.results import Facts, Report
from raysparse.sweep import control
from raysparse.sweep.board import Ledger, Row
from raysparse.sweep.journal import event
from raysparse.sweep.patience import patiently
from raysparse.sweep.trainable import read_reports, with_samples

FactsOf = Callable[[Row], Facts]


class Records(Callback):  # type: ignore[misc]
    """Writes what the ledger says; `interrupted` is asked between two steps of Tune's loop and ends it."""

    def __init__(
        self,
        ledger: Ledger,
        results: Path,
        facts_of: FactsOf,
        interrupted: Callable[[], bool],
        shortage: Callable[[], str | None] = lambda: None,
    ) -> None:
        """shortage: asked with each sign of life; what it says is noted in the journal."""
        self._ledger, self._results, self._facts_of, self._interrupted = ledger, results, facts_of, interrupted
        self._shortage = shortage
        self._beat = 0.0  # when the next sign of life is due
        self._reports: dict[str, dict[int, Report]] = {}  # of open trials

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        row = self._row(trial)
        if row.open:
            self._ledger.add(event("started", stage=row.stage, trial_id=row.trial_id, step=row.step))
            self._write(row)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        row = self._row(trial)
        report = records.report_from(result)
        if report is not None:  # else: it failed without a report
            report = with_samples(self._results / "trials" / row.trial_id, report)
            before = self._known(row).get(report.step)
            if before and report.train_loss is None and not report.diverged:
                # Made again of a checkpoint whose report the trial had lost: what is counted between two is not in it.
                report = dataclasses.replace(
                    report, train_loss=before.train_loss, topology_changed=before.topology_changed
                )
            self._known(row)[report.step] = report
        self._write(row)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._end(self._row(trial))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._end(self._row(trial))

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        if time.monotonic() > self._beat:
            self._beat = time.monotonic() + control.HEARTBEAT_S
            control.beat(self._results)
            if said := self._shortage():
                self._ledger.add(event("note", reason=said))
        if self._interrupted():
            raise KeyboardInterrupt

    def repair(self) -> None:
        """Bring the records to where the ledger is: the driver may have been killed between the two, or in a record."""
        remove_leftovers(self._results / "records" / "*")
        for row in self._ledger.board.rows.values():
            path = self._results / "records" / f"{row.trial_id}.parquet"
            if row.state == "PENDING" and not path.is_file():
                continue
            table = records.read_trial(path) if path.is_file() else None
            reports = {report.step: report for report in records.reports_of(table)} if table else {}
            state = table["state"][0].as_py() if table else None
            if state != ("RUNNING" if row.open else row.state) or any(step not in reports for step in row.fids):
                self._write(row)
            self._reports.pop(row.trial_id, None)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # for Tune's snapshots, which nothing reads

    def _row(self, trial: Trial) -> Row:
        return self._ledger.board.rows[trial.config["trial_id"]]

    def _end(self, row: Row) -> None:
        self._write(row)
        self._reports.pop(row.trial_id, None)

    def _known(self, row: Row) -> dict[int, Report]:
        """The row's reports by step: the ones recorded, and the ones that the trial kept, as far as the ledger goes."""
        if row.trial_id not in self._reports:
            path = self._results / "records" / f"{row.trial_id}.parquet"
            found = records.reports_of(records.read_trial(path)) if path.is_file() else []
            with contextlib.suppress(UsageError):  # damaged: the trial itself fails with it
                found += read_reports(self._results / "trials" / row.trial_id)
            self._reports[row.trial_id] = {report.step: report for report in found if report.step in row.fids}
        return self._reports[row.trial_id]

    def _write(self, row: Row) -> None:
        facts, outcome, known = self._facts_of(row), control.outcome_of(row), self._known(row).values()
        patiently(
            lambda: records.write_trial(self._results, facts, outcome, known), f"record of {row.trial_id}", needed=True
        )
