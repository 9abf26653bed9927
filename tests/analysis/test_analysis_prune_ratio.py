from __future__ import annotations

import pytest
from synthetic_records import Folder, facts

from analysis import prune_ratio, stats
from analysis.load import read
from analysis.sections import Section, split


def test_static_against_dynamic_at_the_papers_sparsity(grid: Section) -> None:
    table = prune_ratio.table(grid)
    assert table is not None
    assert table.title == "Static against dynamic at S = 0.9"
    rows = {(row.method, row.prune_ratio): row for row in table.frame.fillna({"prune_ratio": 0}).itertuples()}
    # Static: 8 + 14.4 + 2; the others differ from it by their offsets less 2.
    assert rows["static", 0.0].fid_mean == pytest.approx(24.4)
    differences = {key: row.static_difference for key, row in rows.items() if key[1]}
    expected = {("magran", 0.5): 2, ("magran", 0.05): -1, ("rigl", 0.5): 1, ("rigl", 0.05): -4}
    assert differences == pytest.approx(expected)
    gap = stats.welch([19.4, 20.4, 21.4], [23.4, 24.4, 25.4], 1 - 0.05 / 4)  # four rows at once
    assert (rows["rigl", 0.05].static_difference_low, rows["rigl", 0.05].static_difference_high) == pytest.approx(
        (gap.low, gap.high)
    )
    assert rows["rigl", 0.05].static_verdict == "lower"
    assert rows["magran", 0.05].static_verdict == stats.NO_DIFFERENCE


def test_lower_means_than_statics_are_bold(grid: Section) -> None:
    table = prune_ratio.table(grid)
    assert table is not None
    lines = [line for line in table.markdown().splitlines() if "**" in line]
    assert ["20.40" in lines[1], "23.40" in lines[0], len(lines)] == [True, True, 2]


def test_the_figure_joins_one_method_and_sparsity(grid: Section) -> None:
    figure = prune_ratio.figure(grid)
    assert figure is not None
    lines = {trace.name: (list(trace.x), list(trace.y)) for trace in figure.data if trace.mode == "lines"}
    x, y = lines["rigl, S = 0.25"]
    assert x == [0.05, 0.5]
    assert y == pytest.approx([10, 15])
    assert "dense (3 seeds)" in lines


def test_one_p_is_no_study(folder: Folder) -> None:
    folder.add(facts("rigl", 0.5), [(400, 10.0)])
    folder.add(facts("static", 0.5), [(400, 10.0)])
    (section,) = split(read(folder.path))
    assert prune_ratio.parts(section) == []


def test_another_sparsity_where_the_papers_is_not_there(folder: Folder) -> None:
    for p in (0.1, 0.3):
        for sparsity in (0.5, 0.75):
            folder.add(facts("rigl", sparsity, stage="search", prune_ratio=p), [(400, 10.0 + p)])
    folder.add(facts("static", 0.5, stage="search"), [(400, 12.0)])
    (section,) = split(read(folder.path))
    table = prune_ratio.table(section)
    assert table is not None
    assert table.title.endswith("S = 0.5")  # .75 has no static
    assert set(table.frame["static_verdict"].dropna()) == {stats.NOT_JUDGED}


def test_another_method_without_p_is_not_taken_for_static(folder: Folder) -> None:
    for seed in (1, 2, 3):
        folder.add(facts("static", 0.5, seed), [(400, 20.0 + seed)])
        folder.add(facts("timesteps", 0.5, seed), [(400, 9.0 + seed)])
        for p in (0.05, 0.5):
            folder.add(facts("rigl", 0.5, seed, prune_ratio=p), [(400, 12.0 + p + seed)])
    (section,) = split(read(folder.path))
    table = prune_ratio.table(section)
    assert table is not None
    assert table.frame["method"].tolist() == ["static", "rigl", "rigl"]
    assert table.frame["static_difference"].tolist()[1:] == pytest.approx([-7.5, -7.95])
    assert set(table.frame["static_verdict"].dropna()) == {"lower"}


def test_budgets_are_not_held_against_each_other(folder: Folder) -> None:
    for seed in (1, 2, 3):
        for p in (0.05, 0.5):
            folder.add(facts("rigl", 0.5, seed, prune_ratio=p), [(400, 12.0 + p + seed / 10)])
        longer = facts("static", 0.5, seed, total_steps=4000, trial_id=f"longer-{seed}")
        folder.add(longer, [(4000, 5.0 + seed / 10)])
        folder.add(facts("rigl", 0.5, seed, total_steps=4000, trial_id=f"rigl-{seed}"), [(4000, 4.0)])
    (section,) = split(read(folder.path))
    assert prune_ratio.table(section) is None
    figure = prune_ratio.figure(section)
    assert figure is not None
    assert [list(trace.y) for trace in figure.data if trace.mode == "lines"] == [pytest.approx([12.25, 12.7])]
    for seed in (1, 2, 3):
        folder.add(facts("static", 0.5, seed), [(400, 15.0 + seed / 10)])
    (section,) = split(read(folder.path))
    table = prune_ratio.table(section)
    assert table is not None
    assert table.frame["fid_mean"].tolist() == pytest.approx([15.2, 12.7, 12.25])


def test_what_a_row_was_picked_from_counts_as_comparisons(folder: Folder) -> None:
    for seed in (1, 2, 3):
        folder.add(facts("static", 0.5, seed), [(400, 15.0 + seed)])
        for p in (0.05, 0.5):
            for interval in (50, 100, 200):
                trial = facts("rigl", 0.5, seed, prune_ratio=p, update_interval_steps=interval)
                folder.add(trial, [(400, 10.0 + p + interval / 100 + seed)])
    (section,) = split(read(folder.path))
    table = prune_ratio.table(section)
    assert table is not None
    assert table.frame["update_interval_steps"].tolist()[1:] == [50, 50]
    gap = stats.welch([12.0, 13.0, 14.0], [16.0, 17.0, 18.0], 1 - 0.05 / 6)  # not 2: three ΔTe for each p
    row = table.frame.iloc[1]
    assert (row["static_difference_low"], row["static_difference_high"]) == pytest.approx((gap.low, gap.high))
