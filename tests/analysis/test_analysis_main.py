from __future__ import annotations

import json
from pathlib import Path

import pytest
from synthetic_records import PROTOCOL, Folder, facts, fill_sweep

import analysis
from analysis import vector
from analysis.__main__ import main


@pytest.fixture(autouse=True)
def _no_vector_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables and page only: SVG and PDF of every figure take seconds a report, and have tests of their own."""
    monkeypatch.setattr(vector, "missing", lambda: "no vector figures in this test")


def test_several_folders_are_one_report(
    sweep: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Folder(tmp_path / "other")
    for seed in (4, 5):
        other.add(facts("rigl", 0.5, seed), [(400, 5.0 + seed)])
    monkeypatch.chdir(tmp_path)
    assert main([str(sweep.path), str(other.path)]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == str(Path("report") / "report.html")
    # 10.5, 11.5, 12.5 of the first folder, 9 and 10 of the second.
    assert "| rigl | 0.5 | 0.5 | 100 | confirm | 5 | 10.70 ± 1.35 |" in printed.out
    assert not (sweep.path / "report").exists()
    assert f"python -m analysis {sweep.path} {other.path}" in (tmp_path / "report" / "report.html").read_text()


def test_the_same_folder_twice_counts_once(sweep: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(sweep.path), str(sweep.path)]) == 0
    printed = capsys.readouterr()
    assert "| rigl | 0.5 | 0.5 | 100 | confirm | 3 |" in printed.out
    assert printed.out.splitlines()[-1] == str(sweep.path / "report" / "report.html")


def test_an_empty_folder_beside_a_full_one_is_no_error(sweep: Folder, tmp_path: Path) -> None:
    (tmp_path / "empty" / "records").mkdir(parents=True)
    assert len(analysis.load(sweep.path, tmp_path / "empty")) == len(analysis.load(sweep.path))


def test_several_tasks_get_an_overview(sweep: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    other = json.dumps(json.loads(PROTOCOL) | {"generated": 10})
    sweep.add(facts("rigl", 0.5, 1, trial_id="other", protocol=other), [(400, 0.1)])
    assert main([str(sweep.path)]) == 0
    assert (sweep.path / "report" / "overview.csv").is_file()
    assert "Overview: dense and the best sparse model" in (sweep.path / "report" / "report.html").read_text()


def test_what_the_last_report_wrote_and_nothing_else_is_removed(sweep: Folder) -> None:
    report = sweep.path / "report"
    assert main([str(sweep.path)]) == 0
    (report / "notes.md").write_text("mine")
    (report / "files.json").write_text(json.dumps(["../records/a.parquet", "/etc/passwd", "old.csv", 3, "notes"]))
    (report / "old.csv").write_text("of the last report")
    (sweep.path / "records" / "keep.txt").write_text("kept")
    assert main([str(sweep.path)]) == 0
    assert (report / "notes.md").read_text() == "mine"
    assert not (report / "old.csv").exists()
    assert (sweep.path / "records" / "keep.txt").exists()


def test_every_table_is_csv_markdown_and_latex(tmp_path: Path) -> None:
    folder = fill_sweep(Folder(tmp_path / "sweep"))
    assert main([str(folder.path)]) == 0
    names = {path.stem for path in (folder.path / "report").glob("*.csv")}
    tables = {"summary", "main", "pareto", "improvement", "iqm", "dynamics", "layers", "stopped", "rungs", "trials"}
    assert names >= tables
    for kind in ("md", "tex"):
        assert {path.stem for path in (folder.path / "report").glob(f"*.{kind}")} == names
