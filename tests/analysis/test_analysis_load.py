from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic_records import Folder, facts, picture, report

import analysis
from analysis.load import column, read, samples_png
from raysparse.errors import UsageError
from raysparse.results import SCHEMA, Outcome, write_trial


def test_one_tidy_row_per_report(folder: Folder) -> None:
    folder.add(facts("rigl", 0.5), [(100, 30.0), (400, 12.0)])
    folder.add(facts("static", 0.5, stage="search"), [], "FAILED", reason="out of memory")
    frame = analysis.load(folder.path)
    assert frame["step"].tolist() == [100, 400]
    assert frame["fid"].tolist() == [30.0, 12.0]
    assert frame["method"].unique().tolist() == ["rigl"]
    assert "samples_png" not in frame


def test_sections_are_had_in_one_call(folder: Folder) -> None:
    folder.add(facts("rigl", 0.5), [(400, 12.0)])
    (section,) = analysis.sections_of(str(folder.path))
    assert section.title == "hershey · chirodiff · FID (stroke_stats)"
    assert section.searched.empty
    assert section.confirmed["fid_mean"].tolist() == [12.0]


def test_every_column_has_a_home(folder: Folder) -> None:
    folder.add(facts("rigl", 0.5), [(400, 12.0)])
    added = {"path", "configuration", "other_settings", "variant", "early_fid"}
    assert set(analysis.load(folder.path)) == {*SCHEMA.names, *added} - {"samples_png", "layer_density", "mask_sample"}


def test_records_without_later_columns_are_read(folder: Folder) -> None:
    path = folder.add(facts("rigl", 0.5), [(400, 12.0)])
    pq.write_table(pq.read_table(path).drop_columns(["mask_sample", "defaults"]), path)
    assert read(folder.path).warnings == ()
    assert column(path, "mask_sample") == [None]


def test_the_result_is_the_last_fid_at_full_budget_not_the_smallest(folder: Folder) -> None:
    folder.add(facts("rigl", 0.5), [(200, 9.0), (400, 12.0)])
    trial = read(folder.path).trials.iloc[0]
    assert trial["result_fid"] == 12.0
    assert trial["full_budget"]
    assert trial["reports"] == 2


@pytest.mark.parametrize("state", ["RUNNING", "STOPPED", "FAILED"])
def test_a_trial_short_of_its_budget_has_no_result(folder: Folder, state: str) -> None:
    folder.add(facts("rigl", 0.5), [(200, 9.0)], state)
    trial = read(folder.path).trials.iloc[0]
    assert np.isnan(trial["result_fid"])
    assert trial["fid"] == 9.0


def test_a_diverged_trials_stand_in_is_no_fid(folder: Folder) -> None:
    folder.add(facts("rigl", 0.5), [(400, 1e9)], diverged=True, reason="loss is not finite")
    records = read(folder.path)
    assert np.isnan(records.trials["result_fid"].iloc[0])
    assert np.isnan(records.reports["fid"].iloc[0])
    assert records.trials["state_reason"].iloc[0] is None or "finite" in records.trials["state_reason"].iloc[0]


def test_an_infinite_fid_is_none(folder: Folder) -> None:
    folder.add(facts("rigl", 0.5), [(400, float("inf"))])
    assert np.isnan(read(folder.path).trials["result_fid"].iloc[0])


def test_trials_without_reports_stay_in_the_list(folder: Folder) -> None:
    folder.add(facts("rigl", 0.5, stage="search"), [], "RUNNING")
    records = read(folder.path)
    assert records.trials[["reports", "state"]].to_numpy().tolist() == [[0, "RUNNING"]]
    assert records.reports.empty


def test_configurations_differ_by_settings_not_by_seed_or_place(folder: Folder) -> None:
    for trial in (facts("rigl", 0.5, 1), facts("rigl", 0.5, 2), facts("rigl", 0.75, 1), facts("rigl", 0.5, 1, lr=0.1)):
        folder.add(dataclasses.replace(trial, trial_id=f"{trial.trial_id}-{hash(trial.config)}"), [(400, 1.0)])
    trials = read(folder.path).trials
    assert trials["configuration"].nunique() == 3
    assert set(trials["other_settings"]) == {"optimizer.lr=0.004", "optimizer.lr=0.1"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"evaluate": {"validation_examples": 1024, "precision": None, "intermediate": None}}),  # came later
        *(
            ({"first_stage": {"sha256": "a", "weights": "/one"}}, {"first_stage": {"sha256": "a", "weights": place}})
            for place in ("/other", None)
        ),
    ],
)
def test_what_a_trials_id_leaves_out_makes_no_other_configuration(
    folder: Folder, before: dict[str, Any], after: dict[str, Any]
) -> None:
    for seed, added in ((1, before), (2, before), (3, after)):
        trial = facts("rigl", 0.5, seed)
        folder.add(dataclasses.replace(trial, config=json.dumps(json.loads(trial.config) | added)), [(400, 9.0 + seed)])
    (section,) = analysis.sections_of(folder.path)
    assert section.confirmed[["seeds", "fid_mean", "other_settings"]].to_numpy().tolist() == [[3, 11.0, ""]]


@pytest.mark.parametrize(
    "added", [{"evaluate": {"validation_examples": 512}}, {"first_stage": {"name": "autoencoder", "weights": "/one"}}]
)
def test_what_a_trials_id_tells_apart_stays_apart(folder: Folder, added: dict[str, Any]) -> None:
    for seed in (1, 2):
        trial = facts("rigl", 0.5, seed)
        config = json.loads(trial.config) | (added if seed == 2 else {})
        folder.add(dataclasses.replace(trial, config=json.dumps(config)), [(400, 9.0 + seed)])
    assert read(folder.path).trials["configuration"].nunique() == 2


def test_defaults_are_told_beside_another_value_and_make_no_other_configuration(folder: Folder) -> None:
    for seed, block, defaults in ((1, None, None), (2, None, '{"sparse.block": 16}'), (1, 8, "{}"), (3, None, "[1")):
        trial = facts("rigl", 0.5, seed, trial_id=f"{block}-{seed}")
        config = json.loads(trial.config)
        config["sparse"]["block"] = block
        folder.add(dataclasses.replace(trial, config=json.dumps(config), defaults=defaults), [(400, 1.0)])
    trials = read(folder.path).trials  # the first of them of a version that did not record defaults
    assert trials["other_settings"].tolist() == ["sparse.block=8", *3 * ["sparse.block=16"]]
    assert trials["configuration"].nunique() == 2


def test_a_later_setting_is_told_beside_another_value(folder: Folder) -> None:
    for examples in (1024, 512):
        trial = facts("rigl", 0.5, trial_id=f"t{examples}")
        config = json.loads(trial.config) | {"evaluate": {"validation_examples": examples}}
        folder.add(dataclasses.replace(trial, config=json.dumps(config)), [(400, 1.0)])
    told = {f"evaluate.validation_examples={examples}" for examples in (1024, 512)}
    assert set(read(folder.path).trials["other_settings"]) == told


def test_what_does_not_vary_is_not_mentioned(sweep: Folder) -> None:
    assert set(read(sweep.path).trials["other_settings"]) == {""}


def test_settings_of_another_protocol_are_not_what_varies(folder: Folder) -> None:
    folder.add(facts(), [(400, 1.0)])
    folder.add(facts(trial_id="other", protocol="{}", lr=0.1), [(400, 1.0)])
    assert set(read(folder.path).trials["other_settings"]) == {""}


def test_a_damaged_file_is_named_and_the_rest_reported(folder: Folder) -> None:
    folder.add(facts(), [(400, 1.0)])
    records = folder.path / "records"
    (records / "damaged.parquet").write_bytes(b"PAR1 nonsense")
    pq.write_table(pa.table({"a": [1]}), records / "foreign.parquet")
    whole = pq.read_table(records / f"{facts().trial_id}.parquet")
    pq.write_table(whole.set_column(0, "sweep", pa.array([b"\xff\xfe"])), records / "types.parquet")
    pq.write_table(whole.slice(0, 0), records / "rowless.parquet")
    nameless = whole.set_column(whole.column_names.index("method"), "method", pa.array([None], pa.string()))
    pq.write_table(nameless, records / "nameless.parquet")
    found = read(folder.path)
    assert len(found.trials) == 1
    assert len(found.warnings) == 5
    for name in ("damaged", "foreign", "types", "rowless", "nameless"):
        assert any(f"{name}.parquet" in warning for warning in found.warnings)


def test_a_copied_record_counts_once(folder: Folder) -> None:
    path = folder.add(facts(), [(200, 2.0), (400, 1.0)])
    write_trial(folder.path / "old", facts(), Outcome(), [report(200, 2.0)])
    (folder.path / "old" / "records" / path.name).rename(path.with_name("0-copy.parquet"))
    found = read(folder.path)
    assert len(found.trials) == 1
    assert found.trials["result_fid"].iloc[0] == 1.0
    assert len(found.reports) == 2
    assert "0-copy.parquet" in found.warnings[0]


def test_an_empty_sweep_and_no_sweep_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder 'records'"):
        read(tmp_path)
    (tmp_path / "records").mkdir()
    with pytest.raises(UsageError, match="is empty"):
        read(tmp_path)
    (tmp_path / "records" / "a.parquet").write_bytes(b"")
    with pytest.raises(UsageError, match=r"no readable record.*\n.*a\.parquet"):
        read(tmp_path)


def test_the_last_sample_grid(folder: Folder) -> None:
    with_grid = folder.add(facts(), [(200, 2.0), (400, 1.0)], samples=picture(10))
    without = folder.add(facts(seed=9), [(400, 1.0)])
    assert samples_png(with_grid) == picture(10)
    assert samples_png(without) is None
