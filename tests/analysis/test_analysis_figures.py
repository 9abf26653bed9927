from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from synthetic_records import DENSE_FLOPS, Folder, facts

from analysis import figures, pareto, style, vector
from analysis.load import read
from analysis.sections import Section, split


def fid_against_flops(section: Section) -> go.Figure | None:
    return pareto.figure(section, pareto.COSTS[0])


ALL = (figures.fid_against_sparsity, fid_against_flops, figures.training_curves, figures.timeline)


def only(folder: Folder) -> Section:
    (section,) = split(read(folder.path))
    return section


def trace(figure: go.Figure | None, name: str) -> Any:
    assert figure is not None
    found = [item for item in figure.data if item.name == name]
    assert len(found) == 1, [item.name for item in figure.data]
    return found[0]


def test_confirmed_marks_have_bars_and_are_filled_search_marks_are_hollow(sweep: Folder) -> None:
    figure = figures.fid_against_sparsity(only(sweep))
    confirmed = trace(figure, "rigl")
    assert sorted(confirmed.y) == [11.5, 21.0]
    assert list(confirmed.error_y.array) == [1.0, 1.0]
    assert confirmed.marker.symbol == "diamond"
    searched = trace(figure, "rigl (one seed)")
    assert sorted(searched.y) == [11.4, 20.0]
    assert searched.marker.symbol == "diamond-open"
    assert searched.error_y.array is None
    assert searched.opacity < 1


def test_no_line_joins_two_budgets(sweep: Folder) -> None:
    for seed in (1, 2):
        sweep.add(facts("rigl", 0.75, seed, total_steps=800), [(800, 9.0)])
    figure = figures.fid_against_sparsity(only(sweep))
    assert figure is not None
    (line,) = [item for item in figure.data if item.mode == "lines" and item.legendgroup == "rigl"]
    assert list(line.y) == [11.5, 21.0]


def test_the_dense_line_and_its_band(sweep: Folder) -> None:
    figure = figures.fid_against_sparsity(only(sweep))
    assert set(trace(figure, "dense (3 seeds)").y) == {11.0}
    assert figure is not None
    (band,) = [item for item in figure.data if item.fill == "toself"]
    assert (min(band.y), max(band.y)) == (10.0, 12.0)


def test_dense_has_a_line_at_each_budget_that_something_sparse_has(two_budgets: Section, sweep: Folder) -> None:
    figure = figures.fid_against_sparsity(two_budgets)
    assert set(trace(figure, "dense, 4,000 steps (3 seeds)").y) == {62.0}
    assert set(trace(figure, "dense, 400 steps (3 seeds)").y) == {12.0}
    sweep.add(facts("dense", 0.0, 1, total_steps=800, trial_id="longer"), [(800, 1.0)])
    assert set(trace(figures.fid_against_sparsity(only(sweep)), "dense (3 seeds)").y) == {11.0}
    assert "rigl, S = 0.5, p = 0.5, ΔTe = 100</b><br>confirm, 4,000 steps, 3 seeds" in trace(figure, "rigl").text[0]


def test_nothing_is_drawn_beside_dense_of_another_budget(folder: Folder) -> None:
    for seed in (1, 2):
        folder.add(facts("dense", 0.0, seed, total_steps=800), [(800, 9.0)])
        folder.add(facts("rigl", 0.5, seed), [(400, 19.0)])
    figure = figures.fid_against_sparsity(only(folder))
    assert figure is not None
    assert [item.name for item in figure.data if item.name] == ["rigl"]


def test_one_dense_seed_has_a_dashed_line_and_no_band(folder: Folder) -> None:
    folder.add(facts("dense"), [(400, 11.0)])
    folder.add(facts("rigl", 0.5), [(400, 12.0)])
    figure = figures.fid_against_sparsity(only(folder))
    assert trace(figure, "dense (1 seed)").line.dash == "dash"
    assert figure is not None
    assert not [item for item in figure.data if item.fill]


def test_the_pareto_front_is_of_confirmed_results(sweep: Folder) -> None:
    # Search had rigl .9 at 20.0, below its confirmed 21.0: it must not shape the front.
    front = trace(fid_against_flops(only(sweep)), "Pareto front (confirmed)")
    assert list(front.y) == [21.0, 11.5, 11.0]
    assert list(front.x) == pytest.approx([0.1 * DENSE_FLOPS, 0.5 * DENSE_FLOPS, DENSE_FLOPS])


def test_curves_break_between_trials_and_mark_the_stopped(sweep: Folder) -> None:
    section = only(sweep)
    figure = figures.training_curves(section)
    assert figure is not None
    static = [item for item in figure.data if item.name == "static" and item.opacity < 1]
    (searched,) = static
    # static searched .5 and .75 with 4 reports each, .9 with one: two gaps, and a text for each position
    assert np.isnan(searched.y).sum() == 2
    assert len(searched.x) == len(searched.y) == len(searched.text) == 4 + 1 + 4 + 1 + 1
    for position in np.flatnonzero(np.isnan(searched.x)):
        assert searched.text[position + 1] != searched.text[position]
    ends = trace(figure, "stopped or failed")
    assert sorted(ends.y) == [35.0, 60.0, 70.0]


def test_validation_loss_curves(sweep: Folder) -> None:
    figure = figures.training_curves(only(sweep), "validation_loss")
    assert figure is not None
    assert figure.layout.yaxis.title.text == "validation loss"


def test_the_timeline_shows_the_search_only(sweep: Folder) -> None:
    figure = figures.timeline(only(sweep))
    assert sorted(trace(figure, "stopped").x) == [100, 100, 200]
    assert list(trace(figure, "failed").x) == [0]
    assert figure is not None
    assert len(figure.layout.yaxis.ticktext) == 10


def test_long_names_leave_the_timeline_its_place(sweep: Folder) -> None:
    section = only(sweep)
    long = section.trials.assign(
        other_settings="sparse.allocation=uniform, sparse.teacher=/a/long/path/of/a/teacher " * 2
    )
    figure = figures.timeline(dataclasses.replace(section, trials=long))
    assert figure is not None
    assert {len(name) for name in figure.layout.yaxis.ticktext} == {48}
    assert vector.files(vector.describe(figure))["svg"], "a warning that the axes have no place left is an error"


def test_nothing_to_draw_is_none(folder: Folder) -> None:
    folder.add(facts("rigl", 0.5, stage="search"), [], "RUNNING")
    section = only(folder)
    for function in ALL[:3]:
        assert function(section) is None


def test_one_bad_trial_makes_the_axis_logarithmic(folder: Folder) -> None:
    folder.add(facts("dense"), [(400, 10.0)])
    folder.add(facts("rigl", 0.5, stage="search"), [(400, 5000.0)])
    figure = fid_against_flops(only(folder))
    assert figure is not None
    assert figure.layout.yaxis.type == "log"


def test_hostile_text_is_escaped_for_plotly(folder: Folder) -> None:
    bad = facts("rigl", 0.5, protocol='{"extractor": "<b>x</b>"}')
    folder.add(type(bad)(**{**vars(bad), "method": "<a href='x'>m</a>"}), [(200, 5.0), (400, 4.0)])
    section = only(folder)
    for function in ALL:
        figure = function(section)
        assert figure is not None
        figure.update_traces(customdata=None)  # what the page filters by: data, which no template shows
        text = figure.to_json()
        assert "<a href" not in text
        assert "\\u003ca" not in text
        assert "<b>x" not in text
        assert "&lt;a href" in text


@pytest.mark.parametrize("method", ["dense", "rigl", "a-new-method"])
def test_looks_are_stable_and_distinct(method: str) -> None:
    looks = style.looks(["dense", "static", "magran", "rigl", "a-new-method", "another"])
    assert len(set(looks.values())) == 6
    assert style.looks([method])[method] == looks[method]
