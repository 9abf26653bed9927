from __future__ import annotations

import pytest
from synthetic_records import Folder, facts

from analysis import dynamics
from analysis.load import read
from analysis.sections import Section, split

STEPS, FLOPS, SECONDS = dynamics.AXES


def test_means_over_seeds_by_hand(grid: Section) -> None:
    points = dynamics.curves(grid, dynamics.best_of_each(grid))
    rigl = points[points["method"].eq("rigl")]  # p = .05 at S = .25: 19, 20, 21 at step 200, 9, 10, 11 at 400
    assert rigl[["step", "fid_mean", "fid_std", "seeds"]].to_numpy().tolist() == [[200, 20, 1, 3], [400, 10, 1, 3]]
    assert rigl["flops_spent_true"].tolist() == pytest.approx([0.75 * 2e11, 0.75 * 4e11])
    assert rigl["train_s"].tolist() == pytest.approx([25, 50])


def test_the_three_axes(grid: Section) -> None:
    parts = {part.name: part for part in dynamics.parts(grid)}
    assert list(parts) == ["dynamics", "dynamics_flops", "dynamics_seconds", "dynamics_table"]
    for name, x in (("dynamics", [200, 400]), ("dynamics_flops", [2e11, 4e11]), ("dynamics_seconds", [20, 40])):
        (dense,) = [trace for trace in parts[name].figure.data if trace.name == "dense"]
        assert list(dense.x) == pytest.approx(x)
        assert list(dense.y) == [22, 12]
    bands = [trace for trace in parts["dynamics"].figure.data if trace.fill == "toself"]
    assert [11, 13, 21, 23] in [sorted(band.y) for band in bands]
    assert len(parts["dynamics_table"].tables[0].frame) == 8


def test_all_methods_at_the_papers_sparsity(folder: Folder) -> None:
    for method, sparsity, fid in [("dense", 0.0, 9), ("static", 0.25, 12), ("static", 0.5, 11), ("rigl", 0.25, 10)]:
        folder.add(facts(method, sparsity), [(200, 30.0), (400, float(fid))])
    (section,) = split(read(folder.path))
    assert dynamics.common_sparsity(section) == 0.25
    part = dynamics.parts(section)[-1]
    assert (part.name, part.title) == ("dynamics_one_s", "FID (stroke_stats) during training at S = 0.25")
    assert sorted(trace.y[-1] for trace in part.figure.data) == [9, 10, 12]
    assert "one seed each, no claim" in part.caption


def test_a_step_that_a_seed_lacks_is_left_out(folder: Folder) -> None:
    folder.add(facts(seed=1), [(100, 9.0), (200, 8.0), (400, 6.0)])
    folder.add(facts(seed=2), [(200, 10.0), (400, 8.0)])
    (section,) = split(read(folder.path))
    points = dynamics.curves(section, dynamics.best_of_each(section))
    assert points[["step", "fid_mean"]].to_numpy().tolist() == [[200, 9], [400, 7]]


def test_nothing_while_nothing_is_finished(folder: Folder) -> None:
    folder.add(facts(), [(200, 10.0)], "RUNNING")
    (section,) = split(read(folder.path))
    assert dynamics.parts(section) == []


def test_the_curves_are_of_one_budget(two_budgets: Section) -> None:
    rows = dynamics.best_of_each(two_budgets)  # dense 12 at 400 steps is lower than 62 at 4,000, and no match for rigl
    assert rows[["method", "total_steps"]].to_numpy().tolist() == [["rigl", 4000], ["dense", 4000]]
    assert "Dense and the best configuration of each method at 4,000 steps" in dynamics.parts(two_budgets)[0].caption
