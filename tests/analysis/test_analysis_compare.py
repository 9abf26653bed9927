from __future__ import annotations

import json
from pathlib import Path

import pytest
from synthetic_records import PROTOCOL, Folder, facts, fill_sweep

from analysis import compare, stats
from analysis.__main__ import main
from analysis.load import read
from analysis.sections import split
from raysparse.errors import UsageError


@pytest.fixture
def other(tmp_path: Path) -> Folder:
    """Three seeds of dense 2 higher than `sweep`'s, rigl .5 8 lower, and a configuration that `sweep` lacks."""
    folder = Folder(tmp_path / "other")
    for seed in (1, 2, 3):
        folder.add(facts("dense", 0.0, seed), [(400, 11.0 + seed)])
        folder.add(facts("rigl", 0.5, seed), [(400, 1.5 + seed)])
        folder.add(facts("magran", 0.25, seed), [(400, 11.0 + seed)])
    return folder


def test_differences_by_hand(sweep: Folder, other: Folder) -> None:
    (one,), (two,) = split(read(sweep.path)), split(read(other.path))
    found = compare.rows(one, two).set_index("what")
    assert list(found.index) == ["dense", "best magran", "best rigl"]
    assert found["difference"].tolist() == pytest.approx([2, 13 - 15, -8])
    gap = stats.welch([2.5, 3.5, 4.5], [10.5, 11.5, 12.5], 1 - 0.05 / 3)  # dense; rigl, picked from two pairs
    assert found.loc["best rigl", ["difference_low", "difference_high"]].tolist() == pytest.approx([gap.low, gap.high])
    assert found["verdict"].tolist() == [stats.NO_DIFFERENCE, stats.NOT_JUDGED, "lower"]


def test_what_both_confirmed_is_compared(sweep: Folder, other: Folder) -> None:
    for seed in (1, 2, 3):
        other.add(facts("rigl", 0.9, seed), [(400, 29.0 + seed)])
    (one,), (two,) = split(read(sweep.path)), split(read(other.path))
    found = compare.rows(one, two)
    assert found["what"].tolist()[-1] == "both confirmed"
    assert found["difference"].tolist()[-1] == pytest.approx(31 - 21)


def test_the_command(sweep: Folder, other: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(sweep.path), str(other.path), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "| best rigl | rigl, S = 0.5, p = 0.5, ΔTe = 100 | 3 | 11.50 ± 1.00 |" in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"compare.csv", "compare.md", "compare.tex"}
    assert main(["compare", str(sweep.path), str(other.path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tables"][0]["rows"][1]["difference_low"] is None


def test_another_protocol_is_refused_with_the_reason(
    sweep: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Folder(tmp_path / "other")
    other.add(facts(protocol=json.dumps(json.loads(PROTOCOL) | {"ddim_steps": 10})), [(400, 1.0)])
    assert main(["compare", str(sweep.path), str(other.path), "--output", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "ddim_steps is 50 in the first and 10 in the second" in printed.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("change", "said"), [({"dataset": "kanjivg"}, "data set is"), ({"model": "unet"}, "model is")])
def test_another_task_is_refused(sweep: Folder, tmp_path: Path, change: dict[str, str], said: str) -> None:
    other = Folder(tmp_path / "other")
    other.add(facts(**change), [(400, 1.0)])
    with pytest.raises(UsageError, match=said):
        compare.tables(sweep.path, other.path)


def test_what_one_sweep_lacks_is_a_warning(sweep: Folder, other: Folder) -> None:
    other.add(facts(trial_id="k", dataset="kanjivg"), [(400, 1.0)])
    (other.path / "records" / "bad.parquet").write_bytes(b"x")
    found, warnings = compare.tables(sweep.path, other.path)
    assert len(found) == 1
    assert any("kanjivg" in text for text in warnings)
    assert any("bad.parquet" in text for text in warnings)


def test_other_budgets_are_not_judged(sweep: Folder, tmp_path: Path) -> None:
    other = Folder(tmp_path / "other")
    for seed in (1, 2):
        other.add(facts("dense", 0.0, seed, total_steps=800), [(800, 5.0 + seed)])
    (one,), (two,) = split(read(sweep.path)), split(read(other.path))
    assert compare.rows(one, two)["verdict"].tolist() == ["another budget"]


def test_the_best_is_of_a_budget_that_both_have(folder: Folder, tmp_path: Path) -> None:
    other = Folder(tmp_path / "other")
    for seed in (1, 2, 3):
        for place, steps, dense, rigl in ((folder, 400, 30, 25), (other, 400, 30, 28), (other, 800, 20, 18)):
            for method, sparsity, fid in (("dense", 0.0, dense), ("rigl", 0.5, rigl)):
                place.add(facts(method, sparsity, seed, total_steps=steps, trial_id=f"{method}-{steps}-{seed}"),
                          [(steps, fid + seed)])  # fmt: skip
    (one,), (two,) = split(read(folder.path)), split(read(other.path))
    found = compare.rows(one, two)
    assert found[["what", "b_total_steps", "difference"]].to_numpy().tolist() == [
        ["dense", 400, 0.0], ["best rigl", 400, 3.0],
    ]  # fmt: skip
    assert not found["verdict"].eq("another budget").any()
    assert compare.rows(two, two)["a_total_steps"].tolist()[:2] == [800, 800]  # the longest of several


def test_what_both_confirmed_goes_before_a_longer_search(folder: Folder, tmp_path: Path) -> None:
    other = Folder(tmp_path / "other")
    for place in (folder, other):
        for seed in (1, 2):
            place.add(facts("rigl", 0.5, seed), [(400, 9.0 + seed)])
        place.add(facts("rigl", 0.5, stage="search", total_steps=800, trial_id="long"), [(800, 5.0)])
    (one,), (two,) = split(read(folder.path)), split(read(other.path))
    assert compare.rows(one, two)["verdict"].tolist() == [stats.NO_DIFFERENCE]
    other.add(facts("static", 0.5, 1, total_steps=800), [(800, 9.0)])
    folder.add(facts("static", 0.5, 1), [(400, 9.0)])
    (table,), _ = compare.tables(folder.path, other.path)
    assert "| best static | static, S = 0.5 | 400 | 1 | 9.00 | static, S = 0.5 | 800 | 1 |" in table.markdown()


@pytest.mark.parametrize("arguments", [["compare"], ["compare", "a"], []])
def test_missing_arguments_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)


def test_absent_folders_are_clear_errors(sweep: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(sweep.path), "absent"]) == 2
    assert "not a results folder" in capsys.readouterr().err


def test_running_sweeps_compare_to_an_empty_table(folder: Folder, tmp_path: Path) -> None:
    other = Folder(tmp_path / "other")
    for place in (folder, other):
        place.add(facts("rigl", 0.5), [(100, 9.0)], "RUNNING")
    (table,), _ = compare.tables(folder.path, other.path)
    assert table.markdown() == "No configuration has a result in both sweeps.\n"


def test_a_sweep_beside_itself_differs_in_nothing(tmp_path: Path) -> None:
    (section,) = split(read(fill_sweep(Folder(tmp_path / "one")).path))
    found = compare.rows(section, section)
    assert set(found["difference"]) == {0.0}
    assert set(found[found["a_stage"].eq("confirm")]["verdict"]) == {stats.NO_DIFFERENCE}
