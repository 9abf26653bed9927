"""TensorBoard's event files: each report once, over optimizer steps, also past a killed driver and a full disk."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from raysparse.results import Report
from raysparse.sweep.board import Ledger
from raysparse.sweep.event_files import EventFiles
from raysparse.sweep.journal import event
from raysparse.sweep.trainable import metrics_of, write_report

TRIAL: Any = SimpleNamespace(config={"trial_id": "a"})


def report(step: int) -> Report:
    picture = io.BytesIO()
    Image.new("RGB", (12, 8)).save(picture, "PNG")
    return Report(
        step=step, train_loss=1 / step, validation_loss=None, fid=10.0 - step, kid=0.1, kid_std=0.0, density=0.25,
        layer_density=json.dumps({"conv.weight": 0.2, "linear.weight": 0.3}), topology_updates=1,
        topology_changed=0.125, train_s=1.0, evaluate_s=1.0, peak_memory_bytes=None, flops_spent_paper=1.0,
        flops_spent_true=1.0, samples_png=picture.getvalue(),
    )  # fmt: skip


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path)
    opened.add(event("planned", stage="search", trial_id="a", method="rigl", total_steps=9, config={"sparse": {}}))
    yield opened
    opened.close()


def hear(files: EventFiles, ledger: Ledger, results: Path, *steps: int) -> None:
    """A trial's reports as they reach the driver: kept by the trial, on record, then told to the callbacks."""
    for step in steps:
        write_report(results / "trials" / "a", report(step))
        ledger.add(event("report", trial_id="a", step=step, fid=10.0 - step))
        files.on_trial_result(0, [], TRIAL, metrics_of(report(step)))


def read(results: Path) -> EventAccumulator:
    found = EventAccumulator(str(results / "tensorboard" / "a"), size_guidance={"images": 0})
    found.Reload()
    return found


def test_a_report_becomes_scalars_layers_and_a_picture(tmp_path: Path, ledger: Ledger) -> None:
    files = EventFiles(ledger, tmp_path)
    hear(files, ledger, tmp_path, 2, 4)
    found = read(tmp_path)
    assert [(item.step, item.value) for item in found.Scalars("fid")] == [(2, 8.0), (4, 6.0)]
    assert found.Scalars("density/linear.weight")[0].value == pytest.approx(0.3)
    assert found.Scalars("topology_changed")[0].value == 0.125
    assert found.Scalars("sparsity")[0].value == 0.75
    assert "validation_loss" not in found.Tags()["scalars"]
    picture = found.Images("samples")[1]
    assert (picture.step, picture.width, picture.height) == (4, 12, 8)
    assert picture.encoded_image_string == report(4).samples_png
    files.on_experiment_end([])


def test_a_new_driver_leaves_no_gap_and_nothing_twice(tmp_path: Path, ledger: Ledger) -> None:
    files = EventFiles(ledger, tmp_path)
    hear(files, ledger, tmp_path, 2)
    write_report(tmp_path / "trials" / "a", report(4))
    ledger.add(event("report", trial_id="a", step=4, fid=6.0))  # and the driver is killed
    files = EventFiles(ledger, tmp_path)
    for step in (2, 4):  # a restarted worker says again what is known
        files.on_trial_result(0, [], TRIAL, metrics_of(report(step)))
    hear(files, ledger, tmp_path, 6)
    files.on_trial_complete(0, [], TRIAL)
    assert [item.step for item in read(tmp_path).Scalars("fid")] == [2, 4, 6]
    assert [item.step for item in read(tmp_path).Images("samples")] == [2, 4, 6]


def test_a_trial_that_fails_without_a_report_and_storage_that_fails_hurt_nobody(tmp_path: Path, ledger: Ledger) -> None:
    files = EventFiles(ledger, tmp_path)
    files.on_trial_result(0, [], TRIAL, {"step": 0, "fid": None, "failed": "ValueError: no"})
    (tmp_path / "tensorboard").write_text("a file where a folder should be")
    hear(files, ledger, tmp_path, 2)
    files.on_trial_complete(0, [], TRIAL)
    assert (tmp_path / "tensorboard").is_file()
