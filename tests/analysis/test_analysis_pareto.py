from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from synthetic_records import DENSE_FLOPS, Folder, facts

from analysis import pareto
from analysis.load import read
from analysis.sections import Section, split

FLOPS, TRAIN, PARAMS, SECONDS = pareto.COSTS


def test_fronts_by_hand(finished: Section) -> None:
    # Confirmed: rigl .9 at 21, rigl .5 at 11.5, static .5 at 16 (beaten by rigl at equal cost), dense at 11.
    rows = pareto.candidates(finished, FLOPS)
    front = rows[pareto.on_front(rows, FLOPS)].sort_values(FLOPS.column)
    assert front["fid_mean"].tolist() == [21.0, 11.5, 11.0]
    assert front[FLOPS.column].tolist() == pytest.approx([0.1 * DENSE_FLOPS, 0.5 * DENSE_FLOPS, DENSE_FLOPS])
    # All trained .1 s a step: the lowest FID alone is on the front of seconds.
    rows = pareto.candidates(finished, SECONDS)
    assert rows[pareto.on_front(rows, SECONDS)]["fid_mean"].tolist() == [11.0]


def test_the_table_says_who_is_on_which_front(finished: Section) -> None:
    frame = pareto.table(finished).frame
    shown = {(row.method, row.sparsity): (row.front_flops, row.front_seconds) for row in frame.itertuples()}
    assert shown == {("dense", 0.0): (True, True), ("rigl", 0.5): (True, False), ("rigl", 0.9): (True, False)}


def test_the_band_by_hand() -> None:
    # The cheap one always gives 5; the dear one's mean of two draws of {1, 9} is 1, 5 or 9: the front is 1 or 5 there.
    rows = pd.DataFrame({
        FLOPS.column: [1.0, 2.0], "fid_mean": [5.0, 5.0], "fid_values": [[5.0, 5.0], [1.0, 9.0]],
    })  # fmt: skip
    band = pareto.bootstrap(rows, FLOPS)
    assert band.to_dict("list") == {"cost": [1.0, 2.0], "low": [5.0, 1.0], "high": [5.0, 5.0]}
    pd.testing.assert_frame_equal(band, pareto.bootstrap(rows, FLOPS))  # seeded


def test_the_band_never_rises_and_one_seed_stays_put() -> None:
    draws = np.random.default_rng(0)
    values = [draws.normal(10, 1, size).tolist() for size in (3, 1, 5, 3)]
    rows = pd.DataFrame({FLOPS.column: [4.0, 1.0, 3.0, 2.0], "fid_mean": [np.mean(v) for v in values],
                         "fid_values": values})  # fmt: skip
    band = pareto.bootstrap(rows, FLOPS)
    assert (band["low"] <= band["high"]).all()
    assert band["low"].is_monotonic_decreasing
    assert band["high"].is_monotonic_decreasing
    assert (band["low"][0], band["high"][0]) == (values[1][0], values[1][0])


def test_beaten_ones_are_grey_and_stopped_ones_marked(finished: Section) -> None:
    figure = pareto.figure(finished, FLOPS)
    assert figure is not None
    grey = {trace.name: sorted(trace.y) for trace in figure.data if trace.marker.color == pareto.GREY}
    assert grey["static"] == [16.0]
    stopped = next(trace for trace in figure.data if trace.name == "stopped early")
    assert sorted(stopped.y) == [35.0, 60.0, 70.0]
    own = next(trace for trace in figure.data if trace.name == "rigl")
    assert sorted(own.y) == [11.5, 21.0]
    assert own.marker.color != pareto.GREY


def test_stopped_trials_cost_what_they_spent(finished: Section) -> None:
    figure = pareto.figure(finished, TRAIN)
    assert figure is not None
    stopped = next(trace for trace in figure.data if trace.name == "stopped early")
    assert sorted(stopped.x) == [1e11, 1e11, 2e11]  # 1e9 a step


def test_no_band_of_one_seed_each_and_it_is_said(folder: Folder) -> None:
    folder.add(facts(stage="search"), [(400, 10.0)])
    folder.add(facts("rigl", 0.5, stage="search"), [(400, 12.0)])
    (section,) = split(read(folder.path))
    parts = pareto.parts(section)
    assert not [trace for trace in parts[0].figure.data if trace.fill == "toself"]
    assert "Band" not in parts[0].caption
    assert "Crosses" not in parts[0].caption
    assert "one seed each" in parts[-1].tables[0].caption


def test_the_band_is_drawn_under_confirmed_results(finished: Section) -> None:
    figure = pareto.figure(finished, PARAMS)
    assert figure is not None
    (band,) = [trace for trace in figure.data if trace.fill == "toself"]
    assert max(band.y) == pytest.approx(21 + 1)  # rigl .9 alone: means of three draws of 20, 21, 22
