"""The driver's callback that keeps the records."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from recorded_trials import record

from raysparse import config, results
from raysparse.results import Facts, Report
from raysparse.sweep.board import Ledger, Row
from raysparse.sweep.journal import event
from raysparse.sweep.records import Records
from raysparse.sweep.trainable import metrics_of


def no_facts(row: Row) -> Facts:
    raise AssertionError("no record is written anew")


def test_what_a_killed_driver_left_of_a_record_is_removed(tmp_path: Path) -> None:
    trial = config.parse({"train": {"steps": 4}})
    path = record(tmp_path, trial, {2: 3.0}, "RUNNING")
    path.with_name(f".{path.name}.k2x_8f.tmp").touch()
    with closing(Ledger(tmp_path)) as ledger:
        Records(ledger, tmp_path, no_facts, lambda: False).repair()
    assert list(path.parent.iterdir()) == [path]


def test_a_report_made_again_keeps_what_is_counted_between_two(tmp_path: Path) -> None:
    """A trial whose reports.jsonl was lost makes that of its checkpoint again, without the mean loss up to it."""
    trial = config.parse({"train": {"steps": 4}})
    ledger = Ledger(tmp_path)
    ledger.add(event("planned", stage="search", trial_id=trial.trial_id, method="dense", config=trial.model_dump()))
    ledger.add(event("report", stage="search", trial_id=trial.trial_id, step=2, fid=3.0))
    path = record(tmp_path, trial, {2: 3.0}, "RUNNING")
    table = results.read_trial(path)
    (empty,) = results.reports_of(table)
    facts = Facts(**{field.name: table[field.name][0].as_py() for field in dataclasses.fields(Facts)})

    def hears(report: Report) -> Report:
        callback: Any = Records(ledger, tmp_path, lambda row: facts, lambda: False)
        callback.on_trial_result(0, [], SimpleNamespace(config={"trial_id": trial.trial_id}), metrics_of(report))
        (kept,) = results.reports_of(results.read_trial(path))
        return kept

    first = dataclasses.replace(empty, train_loss=0.5, topology_changed=0.25)
    assert hears(first) == first
    assert hears(dataclasses.replace(empty, evaluate_s=9.0)) == dataclasses.replace(first, evaluate_s=9.0)
    lost = dataclasses.replace(empty, fid=None, diverged=True, reason="NaN")
    assert hears(lost) == lost
    ledger.close()
