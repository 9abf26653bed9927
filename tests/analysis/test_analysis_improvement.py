from __future__ import annotations

import pytest
from synthetic_records import Folder, facts

from analysis import improvement, robust
from analysis.load import read
from analysis.sections import Section, split


def test_the_probabilities_by_hand(finished: Section) -> None:
    rows = improvement.judged(finished).set_index(["method", "sparsity"])
    # rigl .5 has 10.5, 11.5, 12.5 against 10, 11, 12: pairs won are (10.5: 11, 12), (11.5: 12).
    found = rows.loc[("rigl", 0.5)]
    assert found["probability"] == pytest.approx(3 / 9)
    whole = robust.probability_lower([10.5, 11.5, 12.5], [10.0, 11.0, 12.0], 1 - 0.05 / 3)  # three rows at once
    assert (found["probability_low"], found["probability_high"]) == pytest.approx((whole.low, whole.high))
    assert (found["iqm"], found["dense_iqm"]) == (11.5, 11.0)
    assert rows.loc[("rigl", 0.9), "probability"] == 0


def test_what_is_shown_is_said_in_words(finished: Section) -> None:
    (told,) = improvement.parts(finished)[0].sentences
    assert told.startswith("No difference from dense is shown for rigl, S = 0.5, p = 0.5, ΔTe = 100")
    assert "a higher mean than dense's is shown for static, S = 0.5 and rigl, S = 0.9" in told


def test_the_profile_counts_runs(finished: Section) -> None:
    figure = improvement.profile(finished)
    assert figure is not None
    curves = {trace.name: trace for trace in figure.data if trace.name}
    assert set(curves) == {"dense (3 runs)", "rigl (6 runs)", "static (3 runs)"}
    rigl = curves["rigl (6 runs)"]
    level = max(x for x in rigl.x if x < 20 / 11)  # half of rigl's runs are those at S = .5, all below 20
    assert rigl.y[list(rigl.x).index(level)] == 0.5
    assert rigl.y[-1] == 1


def test_the_profile_stays_in_its_band(finished: Section) -> None:
    figure = improvement.profile(finished)
    assert figure is not None
    bands = {trace.legendgroup: trace for trace in figure.data if trace.fill}
    for curve in (trace for trace in figure.data if trace.name):
        band = bands[curve.legendgroup]
        half = len(band.x) // 2
        x, low, high = band.x[:half], band.y[:half], band.y[half:][::-1]
        assert (x[1:-1:2] == curve.x[1:]).all()  # where the curve is level or goes up, so do the ends
        for place, share in enumerate(curve.y[:-1]):
            assert (low[2 * place : 2 * place + 2] <= share).all()
            assert (high[2 * place : 2 * place + 2] >= share).all()


def test_the_mean_per_method(finished: Section) -> None:
    frame = improvement.method_table(finished).frame.set_index("method")
    assert frame.loc["rigl", ["configurations", "runs"]].tolist() == [2, 6]
    # 10.5, 11.5, 12.5, 20, 21, 22: one of each end goes.
    assert frame.loc["rigl", "iqm"] == pytest.approx((11.5 + 12.5 + 20 + 21) / 4)
    assert frame.loc["dense", "iqm_low"] < 11 < frame.loc["dense", "iqm_high"]


def test_runs_of_another_budget_are_not_profiled_against_dense(sweep: Folder) -> None:
    for seed in (1, 2, 3):
        longer = facts("static", 0.75, seed, total_steps=4000, trial_id=f"longer-{seed}")
        sweep.add(longer, [(4000, 5.0 + seed / 10)])
    (section,) = split(read(sweep.path))
    figure = improvement.profile(section)
    assert figure is not None
    assert {trace.name for trace in figure.data if trace.name} == {"dense (3 runs)", "rigl (6 runs)", "static (3 runs)"}
    assert improvement.method_table(section).frame.set_index("method").loc["static", "iqm"] == 16


@pytest.mark.parametrize("stages", [("search", "search"), ("search", "confirm")])
def test_nothing_is_judged_without_confirmed_dense(folder: Folder, stages: tuple[str, str]) -> None:
    folder.add(facts(stage=stages[0]), [(400, 10.0)])
    for seed in (1, 2):
        folder.add(facts("rigl", 0.5, seed, stage=stages[1], trial_id=f"r{seed}"), [(400, 9.0 + seed)])
    (section,) = split(read(folder.path))
    assert improvement.parts(section) == []


def test_one_seed_a_side_gets_no_interval(folder: Folder) -> None:
    folder.add(facts(), [(400, 10.0)])
    folder.add(facts("rigl", 0.5), [(400, 9.0)])
    (section,) = split(read(folder.path))
    (part,) = improvement.parts(section)
    assert "too few seeds to judge" in part.sentences[0].lower()
    assert "100" in part.tables[0].markdown()
    assert "100 % (" not in part.tables[0].markdown().replace("\N{NO-BREAK SPACE}", " ")
