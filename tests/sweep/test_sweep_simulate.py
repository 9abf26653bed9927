"""The simulator decides what the real classes decide, spends what it says, and is the same every time."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution
from optuna.samplers._tpe import _truncnorm
from optuna.trial import FrozenTrial, TrialState
from ray.tune.schedulers import TrialScheduler
from recorded_trials import record

from raysparse import space
from raysparse.errors import UsageError
from raysparse.space import Sweep
from raysparse.sweep import axes, tpe
from raysparse.sweep.board import Board, Ledger
from raysparse.sweep.curves import PUBLISHED_STEPS, Curve, Descent, Published, Recorded, evaluations
from raysparse.sweep.journal import Event
from raysparse.sweep.scheduler import Rungs
from raysparse.sweep.search import Suggested
from raysparse.sweep.simulate import Pace, grid_fids, in_world, simulate
from raysparse.sweep.tpe import BEST, LATEST, SPREAD, WHOLE, WindowedTPE

SPACES = Path(__file__).resolve().parents[2] / "tune_spaces"
CURVES = Published("kanjivg")


def decisions(board: Board) -> list[tuple[Any, ...]]:
    return [(r.trial_id, r.state, r.number, tuple(r.fids.items()), r.reason) for r in board.rows.values()]


@pytest.fixture(scope="module")
def grid() -> Sweep:
    return space.load(SPACES / "kanjivg.yaml")


def test_a_grid_without_stopping_spends_exactly_its_steps(grid: Sweep) -> None:
    free = grid.model_copy(update={"asha": None, "confirm": None})
    run = simulate(free, CURVES, workers=5)
    assert run.search_steps == run.full_steps == 56 * 40_800
    assert (run.states(), run.stopped_at, run.spent_share, run.confirm_steps) == ({"COMPLETED": 56}, {}, 1.0, 0)
    fids = grid_fids(grid, CURVES)
    assert {row.trial_id: row.fid for row in run.board.rows.values()} == fids
    assert run.best_fid == min(fids.values())


def test_virtual_time_is_that_of_the_busiest_slot(grid: Sweep) -> None:
    free = grid.model_copy(update={"asha": None, "confirm": None})
    pace = Pace(step_s=0.5, evaluation_s=30, jitter=0)
    one = 40_800 * 0.5 + 20 * 30
    for workers, rounds in ((1, 56), (7, 8), (50, 2), (1000, 1)):
        assert simulate(free, CURVES, workers=workers, pace=pace).hours == pytest.approx(rounds * one / 3600)


def test_asha_spends_less_and_every_stopped_trial_is_at_a_rung(grid: Sweep) -> None:
    run = simulate(grid, CURVES, workers=4)
    assert run.spent_share < 0.5
    assert set(run.stopped_at) <= {2040, 8160, 12240, 16320}
    assert run.states()["STOPPED"] == sum(run.stopped_at.values())
    assert run.confirm_steps == 4 * 3 * 40_800  # dense and the best of three methods, three seeds
    dense = next(row for row in run.board.of_stage("search") if row.method == "dense")
    assert dense.state == "COMPLETED"


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    workers=st.integers(1, 9),
    world=st.integers(0, 99),
    trials=st.integers(1, 12),
    sampler=st.sampled_from(["random", "tpe"]),
    factor=st.sampled_from([1.5, 2, 3]),
)
def test_what_holds_of_every_simulation(
    sweep_of: Callable[..., Sweep], workers: int, world: int, trials: int, sampler: str, factor: float
) -> None:
    base = sweep_of()
    assert base.search
    search = base.search.model_dump(mode="json") | {"trials": trials, "sampler": sampler}
    sweep = sweep_of(search=search, asha={"grace_steps": 2, "reduction_factor": factor})
    run = simulate(sweep, CURVES, workers=workers, world=world)
    rows = run.board.of_stage("search")
    assert len(rows) <= trials
    assert run.search_steps == sum(row.step for row in rows) <= run.full_steps == 8 * len(rows)
    assert run.confirm_steps == sum(row.step for row in run.board.of_stage("confirm"))
    assert {row.state for row in run.board.rows.values()} <= {"COMPLETED", "STOPPED"}
    assert all((row.step == row.total_steps) == (row.state == "COMPLETED") for row in rows)
    again = simulate(sweep, CURVES, workers=workers, world=world)
    assert decisions(again.board) == decisions(run.board)
    assert dataclasses.replace(again, board=run.board, driver_cpu_s=run.driver_cpu_s) == run


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_decisions_are_those_of_the_real_classes_in_the_same_order(
    sweep_of: Callable[..., Sweep], tmp_path: Path, sampler: str
) -> None:
    """The order of suggestions and reports is taken from the simulation; the classes are then driven by hand."""
    base = sweep_of()
    assert base.search
    search = base.search.model_dump(mode="json") | {"trials": 14, "sampler": sampler}
    sweep = sweep_of(search=search, confirm=None)
    happened: list[Event] = []
    run = simulate(sweep, CURVES, workers=3, on_event=happened.append)

    ledger = Ledger(tmp_path)
    rungs = Rungs(ledger, "search", 8, sweep.asha)
    searcher = Suggested(sweep, ledger, lambda row: {"trial_id": row.trial_id})
    stopped = 0
    for item in happened:
        if item.kind == "started":
            config = searcher.suggest(f"tune-{item.trial_id}")
            assert isinstance(config, dict)
            assert config["trial_id"] == item.trial_id
        elif item.kind in ("report", "stopped", "completed"):
            trial = SimpleNamespace(trial_id=f"tune-{item.trial_id}", config={"trial_id": item.trial_id})
            result = {"step": item.step, "fid": item.fid}
            said = rungs.on_trial_result(None, trial, result)
            assert (said == TrialScheduler.STOP) == (item.kind != "report")
            if said == TrialScheduler.STOP:
                searcher.on_trial_complete(trial.trial_id, result)
                stopped += item.kind == "stopped"
            else:
                searcher.on_trial_result(trial.trial_id, result)
    assert stopped
    assert decisions(ledger.board) == decisions(run.board)
    ledger.close()


def test_a_simulation_with_a_journal_is_a_sweep_that_can_be_read(grid: Sweep, tmp_path: Path) -> None:
    run = simulate(grid, CURVES, workers=4, journal=tmp_path)
    assert decisions(Board.load(tmp_path)) == decisions(run.board)


def test_targets_are_met_when_a_trial_is_completed_and_end_the_search(grid: Sweep) -> None:
    free = grid.model_copy(update={"asha": None})
    best = min(grid_fids(grid, CURVES, 3).values())
    run = simulate(free, CURVES, workers=1, world=3, targets=(lambda row: row.fid == best, lambda row: True))
    found, first = run.found_steps
    assert first == 40_800  # one at a time: the first trial's own steps
    assert found == run.search_steps
    assert found % 40_800 == 0
    assert simulate(free, CURVES, workers=1, targets=(lambda row: False,)).found_steps == (None,)


def test_worlds_differ_in_their_curves_and_in_the_sampler(grid: Sweep, sweep_of: Callable[..., Sweep]) -> None:
    assert grid_fids(grid, CURVES, 1) != grid_fids(grid, CURVES, 2)
    sweep = sweep_of()
    assert sweep.search
    assert in_world(sweep, 3).search == sweep.search.model_copy(update={"seed": 3})
    assert in_world(grid, 3) == grid


def test_what_is_too_large_is_refused(grid: Sweep, sweep_of: Callable[..., Sweep]) -> None:
    with pytest.raises(UsageError, match="1 to 1,000 workers, got 1,001"):
        simulate(grid, CURVES, workers=1001)
    base = sweep_of()
    assert base.search
    with pytest.raises(UsageError, match=r"at most 10,000 trials, got 10,001"):
        simulate(sweep_of(search=base.search.model_dump(mode="json") | {"trials": 10_001}), CURVES, workers=1)
    with pytest.raises(UsageError, match="a range"):
        grid_fids(base, CURVES)


def trial(grid: Sweep, **point: Any) -> dict[str, Any]:
    return space.trial(grid, point).model_dump(mode="json")


def test_the_mean_is_the_published_one_where_there_is_one(grid: Sweep) -> None:
    final = CURVES.final
    assert final(trial(grid, method="dense")) == (21.10, 0.25)
    assert final(trial(grid, method="static", sparsity=0.5)) == (22.36, 0.87)
    assert final(trial(grid, method="magran", sparsity=0.25, prune_ratio=0.5)) == (21.73, 1.18)
    assert final(trial(grid, method="magran", sparsity=0.5, prune_ratio=0.05))[0] == 20.32  # Table 3
    assert final(trial(grid, method="rigl", sparsity=0.9, prune_ratio=0.05)) == (29.12, 0.57)
    halfway = final(trial(grid, method="magran", sparsity=0.9, prune_ratio=(0.5 * 0.05) ** 0.5))[0]
    assert halfway == pytest.approx((33.02 + 29.01) / 2)
    assert final(trial(grid, method="static", sparsity=0.7))[0] == pytest.approx((22.36 + 30.75) / 2)


@pytest.mark.parametrize(("name", "best"), [("kanjivg", 20.32), ("quickdraw", 24.91), ("celeba_hq", 32.12)])
def test_no_sparse_point_of_the_grid_beats_the_published_best(name: str, best: float) -> None:
    sweep = space.load(SPACES / f"{name}.yaml")
    curves = Published(name)
    means = [curves.final(trial(sweep, **point))[0] for point in space.grid_points(sweep) if point["method"] != "dense"]
    assert min(means) == pytest.approx(best)


def test_curves_end_at_the_final_fid_and_may_cross(grid: Sweep) -> None:
    config = trial(grid, method="dense")
    curve = Published("kanjivg", Descent(noise=0)).curve("a", config, 0)
    assert [step for step, _ in curve] == evaluations(config) == list(range(2040, 40_801, 2040))
    assert all(early > late for (_, early), (_, late) in itertools.pairwise(curve))
    rough = Published("kanjivg", Descent(rate_spread=0.5))
    pairs = [(rough.curve(f"a{n}", config, 0), rough.curve(f"b{n}", config, 0)) for n in range(20)]
    crossed = [(a[1][1] < b[1][1]) != (a[-1][1] < b[-1][1]) for a, b in pairs]
    assert any(crossed)
    assert not all(crossed)


def test_a_data_set_without_published_results_has_one_standing_in() -> None:
    sweep = space.load(SPACES / "quickstart.yaml")
    curves = Published.nearest(space.parsed_base(sweep).model_dump(mode="json"))
    assert curves.source == "synthetic, from the published results on kanjivg, standing in for hershey"
    with pytest.raises(UsageError, match="kanjivg"):
        Published("kanji")
    assert all(Published(name).source for name in PUBLISHED_STEPS)


class Fixed:
    """Curves that are given."""

    source = "fixed"

    def __init__(self, curves: dict[str, Curve]) -> None:
        self._curves = curves

    def curve(self, trial_id: str, config: dict[str, Any], world: int) -> Curve:
        return self._curves[trial_id]


def test_recorded_curves_come_back_as_they_were(sweep_of: Callable[..., Sweep], tmp_path: Path) -> None:
    sweep = sweep_of()
    points = [{"method": "dense"}, {"method": "static", "sparsity": 0.5}, {"method": "static", "sparsity": 0.9}]
    trials = [space.trial(sweep, point) for point in points]
    record(tmp_path, trials[0], {2: 80.0, 4: 60.0, 6: 50.0, 8: 40.0}, "COMPLETED")
    record(tmp_path, trials[1], {2: 90.0, 4: 70.0, 6: 55.0, 8: 45.0}, "COMPLETED")
    record(tmp_path, trials[2], {2: 160.0}, "STOPPED")
    curves = Recorded([tmp_path])
    known = [t.model_dump(mode="json") for t in trials]
    assert curves.curve("x", known[1], 0) == ((2, 90.0), (4, 70.0), (6, 55.0), (8, 45.0))
    # The stopped one goes on by the median of the two: 60/80 and 70/90 at step 4, 40/80 and 45/90 at the end.
    extended = dict(curves.curve("x", known[2], 0))
    assert extended[2] == 160.0
    assert extended[4] == pytest.approx(160 * (60 / 80 + 70 / 90) / 2)
    assert extended[8] == pytest.approx(160 * 0.5)
    near = space.trial(sweep, {"method": "static", "sparsity": 0.55}).model_dump(mode="json")
    assert curves.curve("x", near, 0) == curves.curve("x", known[1], 0)
    longer = json.loads(json.dumps(known[1]))
    longer["train"]["steps"], longer["evaluate"]["every_steps"] = 800, 400
    assert curves.curve("x", longer, 0) == ((400, 70.0), (800, 45.0))
    assert curves.source == f"recorded: 3 trials of {tmp_path}, 1 of them stopped and extended"


def test_recorded_curves_of_two_protocols_are_refused(sweep_of: Callable[..., Sweep], tmp_path: Path) -> None:
    one = space.trial(sweep_of(), {"method": "dense"})
    record(tmp_path, one, {2: 1.0}, "STOPPED")
    with pytest.raises(UsageError, match="no completed trial"):
        Recorded([tmp_path])
    record(tmp_path / "a", one, {8: 1.0}, "COMPLETED", protocol="one")
    record(tmp_path / "b", one, {8: 1.0}, "COMPLETED", protocol="other")
    with pytest.raises(UsageError, match="2 protocols"):
        Recorded([tmp_path / "a", tmp_path / "b"])


def test_tpe_sees_all_trials_of_a_short_search_and_the_best_and_a_sample_of_a_long_one() -> None:
    study, sampler = optuna.create_study(), WindowedTPE({})
    for number in range(2 * WHOLE):
        trial = study.ask()
        if number % 10:
            study.tell(trial, float((number * 37) % 601))
            sampler.learn(study.get_trials(deepcopy=False)[number])
        assert number >= WHOLE or len(sampler.window(study)) == number + 1
    seen = sampler.window(study)
    assert BEST + SPREAD / 2 < len(seen) <= BEST + SPREAD + LATEST
    values = sorted(trial.value for trial in study.get_trials() if trial.value is not None)
    assert set(values[:BEST]) <= {trial.value for trial in seen}
    numbers = [trial.number for trial in seen]
    assert numbers == sorted(set(numbers))
    assert sum(trial.state == TrialState.RUNNING for trial in seen) == LATEST


def test_the_logarithm_of_the_normal_distribution_is_optunas() -> None:
    places = np.linspace(-60, 10, 7001)
    np.testing.assert_allclose(
        _truncnorm._log_ndtr(places), [*map(_truncnorm._log_ndtr_single, places)], rtol=0, atol=1e-11
    )


def optunas_own(
    sampler: WindowedTPE, study: optuna.Study, trial: FrozenTrial, space: dict[str, BaseDistribution]
) -> dict[str, Any]:
    """The method, then its axes, each by Optuna's whole method."""
    draw = optuna.samplers.TPESampler.sample_relative
    view = tpe._View(study, sampler.window(study))
    chosen = draw(sampler, view, trial, {name: kind for name, kind in space.items() if "." not in name})
    own = tuple(f"{method}." for method in chosen.values()) or ("",)
    axes = {name: kind for name, kind in space.items() if name.startswith(own) and "." in name}
    return chosen | draw(sampler, view, trial, axes)


def test_what_tpe_does_once_instead_of_twice_changes_no_suggestion(
    sweep_of: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (axes, tpe):
        monkeypatch.setattr(module, "WHOLE", 12)
    ranges = {"sparsity": {"low": 0.1, "high": 0.9}, "update_interval": {"low": 2, "high": 9}}
    search = {"trials": 60, "sampler": "tpe", "axes": {"dense": {}, "static": {"sparsity": [0.5, 0.9]}, "rigl": ranges}}
    sweep = sweep_of(search=search, confirm=None)
    found = decisions(simulate(sweep, CURVES, workers=7).board)
    assert len(found) > 40
    monkeypatch.setattr(WindowedTPE, "sample_relative", optunas_own)
    assert decisions(simulate(sweep, CURVES, workers=7).board) == found
