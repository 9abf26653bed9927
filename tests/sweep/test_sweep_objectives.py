"""A search with several objectives: what counts as better, what the study is told, and what comes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from optuna.study import StudyDirection
from optuna.trial import TrialState
from typer.testing import CliRunner

from raysparse import space
from raysparse.cli import app
from raysparse.errors import UsageError
from raysparse.space import Confirm, Sweep
from raysparse.sweep import changes, confirm, folder, objectives
from raysparse.sweep.axes import quiet
from raysparse.sweep.board import Ledger, Row
from raysparse.sweep.curves import Published
from raysparse.sweep.journal import event
from raysparse.sweep.search import Suggested, planned
from raysparse.sweep.simulate import simulate
from raysparse.sweep.tpe import ParetoTPE

TWO = ["fid", "flops_inference"]
AXES = {"static": {"sparsity": {"low": 0.1, "high": 0.95}}}


@pytest.fixture
def pareto(sweep_of: Callable[..., Sweep]) -> Sweep:
    return sweep_of(search={"trials": 16, "axes": AXES, "objectives": TWO}, confirm={"seeds": [1], "front": 3})


def row(name: str, fid: float, flops: float, state: str = "COMPLETED") -> Row:
    return Row(name, "search", "static", {}, 0, 8, {}, state, {8: fid}, costs={"flops_inference": flops})


def test_the_front_is_what_nothing_beats() -> None:
    points = {"a": (1.0, 9.0), "b": (2.0, 5.0), "c": (2.0, 6.0), "d": (5.0, 5.0), "e": (9.0, 1.0), "b too": (2.0, 5.0)}
    assert objectives.front(points) == ["a", "b", "b too", "e"]
    assert objectives.front({}) == []
    rows = [row("low", 1, 9), row("cheap", 9, 1), row("beaten", 9, 9), row("stopped", 0, 0, "STOPPED")]
    assert [one.trial_id for one in objectives.front_of(rows)] == ["low", "cheap"]
    rows[0].costs = {}
    assert "low" not in [one.trial_id for one in objectives.front_of(rows)]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_every_point_is_on_the_front_or_beaten_by_one_that_is(points: list[tuple[int, ...]]) -> None:
    named = {str(number): point for number, point in enumerate(points)}
    front = objectives.front(named)
    assert front
    for name, point in named.items():
        beaten = any(objectives.beats(named[other], point) for other in front)
        assert beaten == (name not in front)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["fid", "flops"], r"unknown objective 'flops' \(did you mean 'flops_"),
        (["flops_train"], "fid among them"),
        (["fid", "fid"], "different ones"),
        ([], "fid among them"),
    ],
)
def test_what_are_no_objectives(sweep_of: Callable[..., Sweep], names: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        sweep_of(search={"trials": 4, "axes": AXES, "objectives": names})


def test_costs_are_those_of_the_settings_and_fall_with_sparsity(pareto: Sweep) -> None:
    found = [objectives.costs(space.trial(pareto, {"method": "static", "sparsity": s})) for s in (0.0, 0.5, 0.9)]
    for name in objectives.COLUMNS:
        dense, half, sparse = [one[name] for one in found]
        assert dense > half > sparse > 0
    assert set(objectives.COLUMNS) | {"fid"} == set(space.OBJECTIVES)


def driven(ledger: Ledger, search: Suggested, count: int) -> None:
    """Ask and end trials: every second is stopped after step 2, every fifth fails."""
    for number in range(count):
        config = search.suggest(str(number))
        if config == search.FINISHED:
            return
        assert isinstance(config, dict)
        one = ledger.board.rows[config["trial_id"]]
        fid = 10 * (1 + (one.setting("sparsity") or 0))
        ends: dict[str, Any] = {"kind": "completed", "step": 8, "fid": fid}
        if number % 5 == 4:
            ends = {"kind": "failed", "reason": "lost"}
        elif number % 2:
            ends = {"kind": "stopped", "step": 2, "fid": 2 * fid}
        ledger.add(event(ends.pop("kind"), stage="search", trial_id=one.trial_id, **ends))
        search.on_trial_complete(str(number))


def test_the_study_has_both_values_and_every_intermediate_fid(pareto: Sweep, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    search = Suggested(pareto, ledger, lambda one: {"trial_id": one.trial_id})
    driven(ledger, search, 16)
    assert search.study.directions == [StudyDirection.MINIMIZE] * 2
    assert search.study.metric_names == TWO
    trials = {trial.user_attrs["trial_id"]: trial for trial in search.study.get_trials()}
    states = {"COMPLETED": TrialState.COMPLETE, "STOPPED": TrialState.PRUNED, "FAILED": TrialState.FAIL}
    for one in ledger.board.rows.values():
        told = trials[one.trial_id]
        assert told.state == states[one.state]
        assert told.intermediate_values == one.fids
        assert told.values == ([one.fid, one.costs["flops_inference"]] if one.state == "COMPLETED" else None)
        assert told.user_attrs["flops_inference"] == one.costs["flops_inference"]
    best = {trial.user_attrs["trial_id"] for trial in search.study.best_trials}
    assert best == {one.trial_id for one in objectives.front_of(ledger.board.rows.values())}
    ledger.close()


def test_stopped_trials_are_ranked_by_how_far_they_came_then_by_how_many_beat_them() -> None:
    study = optuna.create_study(directions=["minimize", "minimize"])
    given = [(2, 9.0, 9.0), (4, 5.0, 5.0), (4, 6.0, 6.0), (4, 9.0, 1.0), (4, 9.0, 9.0), (2, 1.0, 1.0)]
    for step, fid, cost in given:
        trial = study.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
        trial.set_user_attr("flops_inference", cost)
        study._storage.set_trial_intermediate_value(trial._trial_id, step, fid)
        study.tell(trial, state=TrialState.PRUNED)
    with quiet():
        seen = ParetoTPE(TWO, 0)._ranked(study).get_trials()
    assert [one.intermediate_values for one in seen] == [
        {2: 1.0}, {4: 0.0}, {4: 1.0}, {4: 0.0}, {4: 3.0}, {2: 0.0}
    ]  # fmt: skip
    assert [one.intermediate_values[step] for one, (step, _, _) in zip(study.trials, given, strict=True)] == [
        fid for _, fid, _ in given
    ], "the study itself is as it was"


def test_what_asha_stopped_draws_the_search_to_where_it_came_furthest() -> None:
    """Half of the trials are stopped at once, at high x; the others late, at low x: the next ones are asked for low."""
    space_of_x = {"x": optuna.distributions.FloatDistribution(0, 1)}

    study = optuna.create_study(directions=["minimize", "minimize"])
    for number in range(40):
        x = (number + 0.5) / 40
        study.enqueue_trial({"x": x})
        trial = study.ask(space_of_x)
        trial.set_user_attr("flops_inference", 1.0)
        study._storage.set_trial_intermediate_value(trial._trial_id, 2 if x > 0.2 else 4, x)
        study.tell(trial, state=TrialState.PRUNED)
    drawn = []
    for seed in range(20):
        with quiet():
            study.sampler = ParetoTPE(TWO, seed)
            trial = study.ask(space_of_x)
        drawn.append(trial.params["x"])
        study.tell(trial, state=TrialState.FAIL)
    assert sum(x < 0.25 for x in drawn) >= 15


def test_members_of_the_front_are_confirmed_spread_along_it_and_dense(pareto: Sweep, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    points = [{"method": "static", "sparsity": s} for s in (0.1, 0.3, 0.5, 0.7, 0.9)]
    for number, point in enumerate(points):
        trial = space.trial(pareto, point)
        ledger.add(planned(trial, point, "search", number, {"flops_inference": 9.0 - number}))
        ledger.add(event("completed", stage="search", trial_id=trial.trial_id, step=8, fid=10.0 + number))
    confirm.plan(pareto, ledger)
    confirm.plan(pareto, ledger)
    assert [item.point for item in ledger.board.chosen] == [points[0], points[2], points[4]]
    assert str(ledger.board.chosen[0].reason) == (
        "1 of 3 taken from the 5 on the Pareto front: FID 10, flops_inference 9"
    )
    assert [one.method for one in ledger.board.of_stage("confirm")] == ["dense", "static", "static", "static"]
    better = {"method": "static", "sparsity": 0.2}  # after all
    trial = space.trial(pareto, better)
    ledger.add(planned(trial, better, "search", 5, {"flops_inference": 1.0}))
    ledger.add(event("completed", stage="search", trial_id=trial.trial_id, step=8, fid=1.0))
    confirm.plan(pareto, ledger)
    assert len(ledger.board.chosen) == 3
    rows = ledger.board.of_stage("search")[:-1]
    assert [one.fid for one, _ in confirm.choose_front(rows, Confirm(seeds=(1,), front=1))] == [10.0]
    assert len(list(confirm.choose_front(rows, Confirm(seeds=(1,), front=9)))) == 5
    assert list(confirm.choose_front([], Confirm(seeds=(1,)))) == []
    ledger.close()


def test_a_simulated_sweep_confirms_its_front(pareto: Sweep) -> None:
    # World 2: one whose front has a dense trial too.
    run = simulate(pareto, Published("kanjivg"), workers=3, world=2)
    front = objectives.front_of(run.board.rows.values())
    assert {one.method for one in front} == {"dense", "static"}
    confirmed = run.board.of_stage("confirm")
    assert len({one.config["sparse"]["sparsity"] for one in confirmed}) == len(confirmed) <= 4
    again = simulate(pareto, Published("kanjivg"), workers=3, world=2)
    assert list(again.board.rows) == list(run.board.rows)
    assert all(not one.costs for one in confirmed)


def test_other_objectives_are_another_sweep(pareto: Sweep, sweep_of: Callable[..., Sweep], tmp_path: Path) -> None:
    folder.create(tmp_path, pareto, "test")
    assert pareto.search
    one = sweep_of(search=pareto.search.model_dump(mode="json") | {"objectives": ["fid"]}, confirm={"seeds": [1]})
    assert one.digest != pareto.digest
    with pytest.raises(UsageError, match=r"one set of objectives for all its trials"):
        changes.accept(tmp_path, one)


def test_the_commands_show_a_front(pareto: Sweep, tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(pareto.model_dump(mode="json")))
    run = CliRunner().invoke
    plan = json.loads(run(app, ["sweep", str(path), "--dry-run", "--json"]).stdout)
    assert plan["confirm_trials"] == 4
    priced = run(app, ["plan", str(path), "--step-seconds", "0.1", "--worlds", "2", "--json"])
    assert json.loads(priced.stdout)["expected"]["confirm_trials"]["high"] <= 4

    out = tmp_path / "out"
    out.mkdir()
    folder.create(out, pareto, "test")
    made = simulate(pareto, Published("kanjivg"), workers=3, journal=out)
    front = objectives.front_of(made.board.rows.values())
    listed = json.loads(run(app, ["ls", str(out), "--json"]).stdout)
    assert [one["trial_id"] for one in listed["front"]] == [one.trial_id for one in front]
    shown = run(app, ["ls", str(out)]).stdout
    assert f"on the Pareto front: {front[0].trial_id}, fid {front[0].fid:.4g}, flops_inference" in shown
    watched = run(app, ["watch", str(out), "--once"])
    assert watched.exit_code == 0, watched.output
