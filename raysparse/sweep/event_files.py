"""TensorBoard event files of our own, RESULTS/tensorboard/<id>: FID, losses, density per layer, changes, samples.

Tune writes event files too, but over its own count of reports, which starts again with each process, and without
pictures and layers. These are over optimizer steps. They can be made again from what the trial has kept: a driver
writes a trial's files anew when it first hears of it, so that one killed between two writes leaves no gap.
"""

from __future__ import annotations

import json
import shutil
import struct
import time
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial

from raysparse.errors import UsageError
from raysparse.results import Report, report_from
from raysparse.sweep.board import Ledger, Row
from raysparse.sweep.trainable import read_reports, with_samples

SCALARS = (
    "fid",
    "intermediate_fid",
    "kid",
    "train_loss",
    "validation_loss",
    "topology_changed",
    "train_s",
    "peak_memory_bytes",
)


class EventFiles(Callback):  # type: ignore[misc]
    """Writes each report once. Storage that fails costs pictures, never a trial."""

    def __init__(self, ledger: Ledger, results: Path) -> None:
        self._ledger, self._results = ledger, results
        self._writers: dict[str, Any] = {}  # of open trials
        self._written: dict[str, set[int]] = {}

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        row = self._ledger.board.rows[trial.config["trial_id"]]
        try:
            for report in self._unwritten(row, result):
                self._write(row, report)
        except (OSError, UsageError):  # a full disk, damaged reports: they show elsewhere
            self._close(row.trial_id)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._close(trial.config["trial_id"])

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._close(trial.config["trial_id"])

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        for trial_id in list(self._writers):
            self._close(trial_id)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # for Tune's snapshots, which nothing reads

    def _unwritten(self, row: Row, result: dict[str, Any]) -> list[Report]:
        """What is on record and not yet in the files; of a trial that is new here, all of it."""
        if row.trial_id not in self._written:
            folder = self._results / "tensorboard" / row.trial_id
            shutil.rmtree(folder, ignore_errors=True)
            self._written[row.trial_id] = set()
            return [report for report in read_reports(self._trial(row), samples=False) if report.step in row.fids]
        known, report = self._written[row.trial_id], report_from(result)
        if report is None or report.step in known or report.step not in row.fids:
            return []  # it failed without a report, or a restarted process says again what is known
        return [report]

    def _write(self, row: Row, report: Report) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if row.trial_id not in self._writers:
            self._writers[row.trial_id] = EventFileWriter(str(self._results / "tensorboard" / row.trial_id))
        writer = self._writers[row.trial_id]
        summary = summary_of(with_samples(self._trial(row), report))
        writer.add_event(Event(wall_time=time.time(), step=report.step, summary=summary))
        writer.flush()
        self._written[row.trial_id].add(report.step)

    def _close(self, trial_id: str) -> None:
        writer = self._writers.pop(trial_id, None)
        if writer is not None:
            try:
                writer.close()
            except OSError:
                return  # what was written is there

    def _trial(self, row: Row) -> Path:
        return self._results / "trials" / row.trial_id


def summary_of(report: Report) -> Any:
    """A report as TensorBoard's protocol buffer; the picture's PNG bytes go in as they are."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = {name: getattr(report, name) for name in SCALARS} | {"sparsity": 1 - report.density}
    values |= {f"density/{layer}": density for layer, density in json.loads(report.layer_density).items()}
    items = [Summary.Value(tag=name, simple_value=value) for name, value in values.items() if value is not None]
    png = report.samples_png
    if png is not None:
        width, height = struct.unpack(">II", png[16:24])  # PNG: the header's first two numbers
        picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        items.append(Summary.Value(tag="samples", image=picture))
    return Summary(value=items)
