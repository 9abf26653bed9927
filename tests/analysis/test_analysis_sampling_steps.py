from __future__ import annotations

import pytest
from synthetic_grid import evaluated, fill_grid
from synthetic_records import Folder, facts

from analysis import sampling_steps
from analysis.load import read
from analysis.sections import Section, split


def test_the_table_by_hand(grid: Section) -> None:
    rows = sampling_steps.by_steps(grid)
    found = {(row.method, row.ddim_steps): (row.fid_mean, row.fid_std, row.seeds) for row in rows.itertuples()}
    # Dense 11, 12, 13 at 50 steps, twice that at 25, half at 100; rigl 9, 10, 11. The trials' own values are there too.
    assert found == {
        ("dense", 25): (24, 2, 3), ("dense", 50): (12, 1, 3), ("dense", 100): (6, 0.5, 3),
        ("rigl", 25): (20, 2, 3), ("rigl", 50): (10, 1, 3), ("rigl", 100): (5, 0.5, 3),
    }  # fmt: skip


def test_bold_is_judged_within_a_number_of_steps(grid: Section) -> None:
    (part,) = sampling_steps.parts(grid)
    lines = part.tables[0].markdown().splitlines()
    assert "| dense | confirm | 24.00 ± 2.00 | 12.00 ± 1.00 | 6.00 ± 0.50 |" in lines
    assert lines[-1].count("**<u>") == 3


def test_budgets_are_told_apart_and_marked_each_by_itself(two_budgets: Section) -> None:
    (part,) = sampling_steps.parts(two_budgets)
    rows = part.tables[0].markdown().splitlines()[2:]
    assert sorted(rows) == [
        "| dense | 4,000 | confirm | 62.00 ± 1.00 | 61.00 ± 1.00 |",
        "| dense | 400 | confirm | 12.00 ± 1.00 | 11.00 ± 1.00 |",
        "| rigl, S = 0.5, p = 0.5, ΔTe = 100 | 4,000 | confirm | **<u>7.00 ± 1.00</u>** | **<u>6.00 ± 1.00</u>** |",
        "| static, S = 0.5 | 400 | confirm | <u>22.00 ± 1.00</u> | <u>21.00 ± 1.00</u> |",
    ]
    assert [trace.name for trace in part.figure.data[:2]] == [
        "dense, trained 4,000 steps",
        "dense, trained 400 steps",
    ]


def test_other_protocols_are_left_out_and_said(grid: Section) -> None:
    (part,) = sampling_steps.parts(grid)
    assert part.sentences == (
        "6 evaluations under protocols that differ in more than the number of steps are left out here.",
    )
    assert "compare models above one tick" in part.caption


def test_lines_go_over_the_steps(grid: Section) -> None:
    figure = sampling_steps.figure(grid, sampling_steps.by_steps(grid))
    rigl = next(trace for trace in figure.data if trace.name.startswith("rigl"))
    assert (list(rigl.x), list(rigl.y)) == ([25, 50, 100], [20, 10, 5])
    assert list(figure.layout.xaxis.ticktext) == ["25", "50", "100"]


def test_two_search_trials_of_a_configuration_stay_two(folder: Folder) -> None:
    for seed in (1, 2, 3):
        for method, s, p in (("dense", 0.0, None), ("rigl", 0.25, 0.05)):
            name = facts(method, s, seed, prune_ratio=p).trial_id  # as `evaluated` names it
            folder.add(facts(method, s, seed, stage="search", trial_id=name, prune_ratio=p), [(400, 20.0 + seed)])
    evaluated(folder, 25, 2.0)
    evaluated(folder, 100, 0.5)
    (section,) = split(read(folder.path))
    rows = sampling_steps.by_steps(section)
    assert len(sampling_steps.table(section, rows).frame) == 6
    figure = sampling_steps.figure(section, rows)
    assert [list(trace.x) for trace in figure.data] == 6 * [[25, 50, 100]]


def test_nothing_without_evaluations_and_nothing_of_unknown_trials(folder: Folder) -> None:
    folder.add(facts(), [(400, 10.0)])
    (section,) = split(read(folder.path))
    assert sampling_steps.parts(section) == []
    evaluated(folder, 25, 1.0)  # of seeds and methods that are not among the records
    (section,) = split(read(folder.path))
    assert sampling_steps.parts(section) == []


def test_a_damaged_evaluation_is_named(folder: Folder) -> None:
    fill_grid(folder)
    evaluated(folder, 25, 1.0)
    (folder.path / "evaluations" / "bad.parquet").write_bytes(b"x")
    records = read(folder.path)
    assert len(records.evaluations) == 6
    assert [warning for warning in records.warnings if "bad.parquet" in warning]
    assert records.evaluations["stage"].unique().tolist() == ["confirm"]


@pytest.mark.parametrize("protocol", ["not json", "[1]"])
def test_a_protocol_that_is_no_object_has_no_steps(folder: Folder, protocol: str) -> None:
    fill_grid(folder, protocol=protocol)
    evaluated(folder, 25, 1.0)
    (section,) = split(read(folder.path))
    assert sampling_steps.parts(section) == []
