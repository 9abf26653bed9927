"""Trials whose intermediate FIDs have a protocol of their own: no place compares or draws the two as one."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from synthetic_records import PROTOCOL, Folder, facts, report

from analysis import dynamics, figures, pareto, parts, rungs, stamp, tables
from analysis.load import read
from analysis.sections import Section, split
from raysparse.results import Outcome, write_trial

EARLY = json.dumps(json.loads(PROTOCOL) | {"generated": 500, "ddim_steps": 10}, sort_keys=True)
NAME = "intermediate FID (stroke_stats), 500 samples, 10 DDIM steps"
# An intermediate FID is far above a final one here: where they mix, it shows.
FAR = 1000.0


def add(folder: Folder, number: int, final: float | None, protocol: str | None = EARLY, **changes: Any) -> None:
    """A trial with early FIDs of 1000 and more at steps 100, 200 and, where it was completed, 400, its FID there."""
    steps = (100, 200) if final is None else (100, 200, 400)
    trial = facts("static", 0.5, **{"stage": "search", "trial_id": f"t{number}", "lr": 0.001 * (number + 1)} | changes)
    reports = [
        dataclasses.replace(report(step, final if step == 400 else None), intermediate_fid=FAR + number + 400 / step)
        for step in steps
    ]
    state = Outcome("STOPPED", 200) if final is None else Outcome("COMPLETED")
    write_trial(folder.path, dataclasses.replace(trial, intermediate_protocol=protocol), state, reports)


@pytest.fixture
def section(folder: Folder) -> Section:
    for number, final in enumerate([10.0, 12.0, 11.0, 13.0, 14.0]):
        add(folder, number, final)
    add(folder, 5, None)
    (only,) = split(read(folder.path))
    return only


def values(figure: Any) -> np.ndarray[Any, Any]:
    drawn = np.concatenate([np.asarray(trace.y, np.float64) for trace in figure.data if trace.y is not None])
    return drawn[np.isfinite(drawn)]


def test_results_are_full_ones_and_curves_intermediate_ones(section: Section) -> None:
    assert sorted(section.searched["fid_mean"]) == [10, 11, 12, 13, 14]
    assert section.early_name == NAME
    curves = figures.training_curves(section)
    assert curves.layout.yaxis.title.text == NAME
    assert values(curves).min() > FAR
    points = dynamics.curves(section, dynamics.best_of_each(section))
    assert points["step"].tolist() == [100, 200, 400]
    assert points["fid_mean"].tolist() == [1004, 1002, 1001]
    assert dynamics.parts(section)[0].title.startswith(NAME)
    assert dynamics.table(section, points).frame["protocol"].eq(EARLY).all()


def test_no_figure_of_results_holds_an_intermediate_value(section: Section) -> None:
    for cost in pareto.COSTS:
        drawn = pareto.figure(section, cost)
        assert drawn is None or values(drawn).max() < FAR
    assert values(figures.fid_against_sparsity(section)).max() < FAR


def test_rank_correlation_is_of_the_intermediate_values_at_the_rung_with_the_results(section: Section) -> None:
    (row,) = rungs.correlations(section).to_dict("records")
    assert (row["step"], row["trials_there"], row["trials"]) == (200, 6, 5)
    assert row["rho"] == pytest.approx(0.9)  # places 1 3 2 4 5 against 1 to 5
    assert (row["protocol"], row["intermediate_protocol"]) == (PROTOCOL, EARLY)
    assert NAME in rungs.table(section, rungs.correlations(section)).caption


def test_tables_name_the_protocol_of_each_value(section: Section) -> None:
    stopped, trials = tables.stopped(section), tables.trials(section)
    assert f"{NAME} then" in stopped.markdown()
    assert stopped.frame["early_fid"].tolist() == [1007]
    assert stopped.frame["fid"].isna().all()
    assert {f"last {section.fid_name}", f"last {NAME}"} <= {column.heading for column in trials.columns}
    assert NAME in str(stamp.html(section, (), "here"))


def test_early_values_of_another_sweep_are_drawn_on_no_common_axis(section: Section, folder: Folder) -> None:
    add(folder, 6, 9.0, protocol=json.dumps(json.loads(EARLY) | {"ddim_steps": 20}), seed=3)
    folder.add(facts("static", 0.5, seed=4, stage="search", trial_id="t7"), [(200, 50.0), (400, 8.0)])
    (both,) = split(read(folder.path))
    assert sorted(both.searched["fid_mean"]) == [8, 9, 10, 11, 12, 13, 14], "results compare"
    curves = figures.training_curves(both)
    assert len(values(curves)) == len(values(figures.training_curves(section)))
    assert rungs.correlations(both)["trials"].tolist() == [5]


def test_every_part_of_the_page_is_made(section: Section) -> None:
    assert {"curves", "rungs", "stopped", "dynamics"} <= {part.name for part in parts.parts(section)}
