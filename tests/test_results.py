"""Records: whole files, last report of a step wins, damage is named."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysparse import results
from raysparse.errors import UsageError


def filled(part: type, **changes: Any) -> Any:
    """A Facts or Report with a value of the right type in each field."""
    samples = {"int": 3, "float": 0.5, "str": "x", "bytes": b"\x89PNG", "bool": False}
    hints = get_type_hints(part)
    values = {
        f.name: samples[
            str(results._arrow_type(hints[f.name]))
            .replace("string", "str")
            .replace("int64", "int")
            .replace("double", "float")
            .replace("binary", "bytes")
        ]
        for f in dataclasses.fields(part)
    }
    return part(**(values | changes))


def test_records_come_back_as_they_went(tmp_path: Path) -> None:
    facts = filled(results.Facts, trial_id="rigl-1", prune_ratio=None)
    reports = [filled(results.Report, step=step, fid=float(step)) for step in (20, 10)]
    path = results.write_trial(tmp_path, facts, results.Outcome("STOPPED", 20, "rung 20"), reports)
    table = results.read_trial(path)
    assert results.record_paths(tmp_path) == [path]
    assert table.schema.equals(results.SCHEMA)
    assert results.reports_of(table) == reports[::-1]
    row = table.to_pylist()[0]
    assert row["prune_ratio"] is None
    assert (row["state"], row["stopped_at_step"]) == ("STOPPED", 20)
    assert [p.name for p in path.parent.iterdir()] == ["rigl-1.parquet"]


def test_the_last_report_of_a_step_wins(tmp_path: Path) -> None:
    facts = filled(results.Facts, trial_id="t")
    reports = [filled(results.Report, step=10, fid=1.0), filled(results.Report, step=10, fid=2.0)]
    path = results.write_trial(tmp_path, facts, results.Outcome(), reports)
    assert [report.fid for report in results.reports_of(results.read_trial(path))] == [2.0]


def test_a_trial_without_reports_still_has_a_row(tmp_path: Path) -> None:
    path = results.write_trial(tmp_path, filled(results.Facts, trial_id="t"), results.Outcome("FAILED", None, "no"), [])
    table = results.read_trial(path)
    assert table.num_rows == 1
    assert results.reports_of(table) == []
    assert table["state_reason"].to_pylist() == ["no"]


def test_an_unknown_state_is_our_own_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="PRUNED"):
        results.write_trial(tmp_path, filled(results.Facts), results.Outcome("PRUNED"), [])


@pytest.mark.parametrize("damage", [b"", b"not parquet", None])
def test_a_damaged_file_is_named(tmp_path: Path, damage: bytes | None) -> None:
    path = results.write_trial(
        tmp_path, filled(results.Facts, trial_id="t"), results.Outcome(), [filled(results.Report)]
    )
    path.write_bytes(path.read_bytes()[:-40] if damage is None else damage)
    with pytest.raises(UsageError, match=r"t\.parquet is not a readable Parquet file"):
        results.read_trial(path)


def test_a_pipe_among_the_records_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    os.mkfifo(tmp_path / "records" / "rigl-1.parquet")
    assert results.record_paths(tmp_path) == []


def test_a_foreign_parquet_file_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="lacks the columns sweep"):
        results.read_trial(tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="no folder 'records'"):
        results.record_paths(tmp_path)


def test_some_columns_and_records_of_before(tmp_path: Path) -> None:
    path = results.write_trial(tmp_path, filled(results.Facts), results.Outcome(), [filled(results.Report)])
    assert results.read_trial(path, ["step", "fid"]).column_names == ["step", "fid"]
    whole = pq.read_table(path)
    pq.write_table(whole.drop_columns(["mask_sample", "compile_s"]), path)  # a column that came later
    (before,) = results.reports_of(results.read_trial(path))
    assert before == filled(results.Report, mask_sample=None, compile_s=None)
    pq.write_table(whole.drop_columns(["fid"]), path)
    with pytest.raises(UsageError, match="lacks the columns fid"):
        results.read_trial(path, ["step"])


def test_a_report_from_what_a_program_sent() -> None:
    whole = filled(results.Report)
    values = dataclasses.asdict(whole)
    assert results.report_from(values | {"other": 1}) == whole
    later = {name: value for name, value in values.items() if name not in ("mask_sample", "samples_png")}
    assert results.report_from(later) == dataclasses.replace(whole, mask_sample=None, samples_png=None)
    assert results.report_from({name: value for name, value in values.items() if name != "step"}) is None
