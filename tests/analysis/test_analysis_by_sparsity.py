from __future__ import annotations

import pytest
from synthetic_grid import mean
from synthetic_records import Folder, facts

from analysis import by_sparsity, figures
from analysis.load import read
from analysis.sections import Section, split


def test_each_p_of_the_grid_has_figures_of_its_own(grid: Section) -> None:
    parts = {part.name: part for part in by_sparsity.for_each_ratio(grid)}
    assert list(parts) == ["sparsity_fid_p0", "sparsity_kid_p0", "sparsity_fid_p1", "sparsity_kid_p1"]
    assert parts["sparsity_fid_p0"].title.endswith("p = 0.5")
    assert parts["sparsity_fid_p1"].title.endswith("p = 0.05")


def test_a_figure_of_one_p_has_that_p_and_methods_without_one(grid: Section) -> None:
    figure = figures.fid_against_sparsity(grid, "fid", 0.05)
    assert figure is not None
    shown = {trace.name: list(trace.y) for trace in figure.data if trace.mode == "markers"}
    assert shown["rigl"] == pytest.approx([mean("rigl", s, 0.05) for s in (0.25, 0.5, 0.9)])
    assert shown["static"] == pytest.approx([mean("static", s, None) for s in (0.25, 0.5, 0.9)])
    rigl = next(trace for trace in figure.data if trace.name == "rigl")
    assert [list(row) for row in rigl.customdata] == [["rigl", s, 0.05] for s in (0.25, 0.5, 0.9)]


def test_kid_has_its_own_axis_and_dense_line(grid: Section) -> None:
    figure = figures.fid_against_sparsity(grid, "kid")
    assert figure is not None
    assert figure.layout.yaxis.title.text == "KID (stroke_stats)"
    dense = next(trace for trace in figure.data if trace.name == "dense (3 seeds)")
    assert list(dense.y) == pytest.approx([0.012] * 3)


def test_a_search_that_draws_p_has_no_figure_per_p(folder: Folder) -> None:
    for number in range(6):
        trial = facts("rigl", (0.5, 0.9)[number % 2], stage="search", prune_ratio=0.1 + number / 100)
        folder.add(trial, [(400, 10.0)])
    (section,) = split(read(folder.path))
    assert by_sparsity.common_ratios(section) == []
    assert by_sparsity.for_each_ratio(section) == []
    assert len(by_sparsity.over_sparsity(section)) == 2
