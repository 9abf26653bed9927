from __future__ import annotations

import pytest
import scipy.stats
from synthetic_records import Folder, facts

from analysis import rungs
from analysis.load import read
from analysis.sections import Section, split


def only(folder: Folder) -> Section:
    (section,) = split(read(folder.path))
    return section


def search(folder: Folder, finals: list[float]) -> Section:
    """Trials whose FID at step 100 is 50, 51, ... in their order; two more were stopped there."""
    for number, final in enumerate(finals):
        trial = facts("static", 0.5, stage="search", trial_id=f"t{number}", lr=0.001 * (number + 1))
        folder.add(trial, [(100, 50.0 + number), (400, final)])
    for number in (8, 9):
        folder.add(facts("static", 0.5, stage="search", trial_id=f"t{number}"), [(100, 90.0)], "STOPPED")
    return only(folder)


def test_rank_correlation_of_a_rung_by_hand(folder: Folder) -> None:
    section = search(folder, [10.0, 12.0, 11.0, 13.0, 9.0, 14.0])
    (row,) = rungs.correlations(section).to_dict("records")
    assert (row["step"], row["trials_there"], row["trials"]) == (100, 8, 6)
    assert row["rho"] == pytest.approx(scipy.stats.spearmanr(range(6), [10, 12, 11, 13, 9, 14]).statistic)
    assert row["best_kept"] == 5  # 9.0 was the fifth at the rung
    assert (
        "that the early order says anything about the final one is not shown here"
        in rungs.parts(section)[-1].sentences[0]
    )


def test_a_rung_that_tells_the_order_is_said_to(folder: Folder) -> None:
    section = search(folder, [10.0, 11.0, 12.0, 13.0, 14.0, 15.0])
    assert "the early order says something about the final one" in rungs.parts(section)[-1].sentences[0]


def test_what_was_saved(finished: Section) -> None:
    said = rungs.saved(finished).replace("\N{NO-BREAK SPACE}", " ")
    assert "3 of 10 were stopped early: 800 of 4,000 steps (20 %)" in said
    # FLOPs of 1e11 times density: .1 x .75 + .25 x .5 + .1 x .75 of 1 + .5 + .25 + .5 + .5 + 3 x .1 + 2 x .25.
    assert f"{100 * 0.275 / 3.55:.0f} % of the training FLOPs" in said


def test_without_stopped_trials_the_common_reports_are_the_rungs(folder: Folder) -> None:
    for number in range(5):
        curve = [(step, 100 / step + number) for step in (100, 200, 300)] + [(400, float(number))]
        folder.add(facts("static", 0.5, stage="search", trial_id=f"t{number}"), curve)
    rows = rungs.correlations(only(folder))
    assert rows["step"].tolist() == [100, 200, 300]
    assert rows["rho"].tolist() == pytest.approx([1, 1, 1])


def test_where_a_person_stopped_a_trial_is_no_rung_and_saves_nothing_of_a_search(folder: Folder) -> None:
    section = search(folder, [10.0, 12.0, 11.0, 13.0, 9.0, 14.0])
    said, rows = rungs.saved(section), rungs.correlations(section)
    folder.add(facts("static", 0.5, 3, trial_id="by-hand"), [(200, 9.0)], "STOPPED", reason="by me@here at step 200")
    assert rungs.correlations(only(folder))["step"].tolist() == rows["step"].tolist() == [100]
    assert rungs.saved(only(folder)) == said  # it is a confirmed one


def test_too_few_trials_say_so_or_nothing(folder: Folder) -> None:
    section = search(folder, [10.0, 11.0, 12.0])
    assert rungs.parts(section)[-1].sentences[0].startswith("Only 3 trials have a value")
    assert rungs.correlations(search(Folder(folder.path / "other"), [10.0])).empty


def test_a_correlation_is_of_one_budget(folder: Folder) -> None:
    # The longer ones are lower at the rung and in the end, as two clouds apart they would make a correlation.
    for number in range(4):
        trial = facts("rigl", 0.5, stage="search", trial_id=f"l{number}", lr=1e-4 * (number + 1), total_steps=800)
        folder.add(trial, [(100, 20.0 + number), (800, 1.0 + number)])
    section = search(folder, [10.0, 12.0, 11.0, 13.0, 9.0, 14.0])
    rows = rungs.correlations(section)
    assert rows[["step", "total_steps", "trials_there", "trials"]].to_numpy().tolist() == [[100, 400, 8, 6]]
    assert "at 400 steps, what most trials have" in rungs.table(section, rows).caption
