"""Second chances: who gets one, in which order, and that a sweep with them is whole, the same, and can be resumed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from raysparse import config, space
from raysparse.asha import Asha
from raysparse.space import Sweep
from raysparse.sweep import chances
from raysparse.sweep.board import Board, Ledger, Row
from raysparse.sweep.curves import Published
from raysparse.sweep.journal import Event, Journal, event, read
from raysparse.sweep.scheduler import Rungs
from raysparse.sweep.search import Listed, Suggested
from raysparse.sweep.simulate import simulate

CURVES = Published("kanjivg")


def board_of(*trials: tuple[str, str, dict[int, float]]) -> Board:
    """(name, state, FIDs) of trials of 16 steps."""
    board = Board()
    for name, state, fids in trials:
        board.rows[name] = Row(name, "search", "rigl", {}, 0, 16, {}, state, dict(fids))
    return board


def asha(count: int, **more: Any) -> Asha:
    return Asha(grace_steps=2, reduction_factor=2, second_chances=count, **more)


def test_the_best_of_their_rung_come_first_then_the_others_from_the_lowest_rung() -> None:
    board = board_of(
        ("done", "COMPLETED", {2: 5.0, 4: 4.0, 8: 3.0, 16: 2.0}),
        ("unlucky", "STOPPED", {2: 4.0}),  # the best at rung 2 in the end
        ("second", "STOPPED", {2: 4.5}),
        ("far", "STOPPED", {2: 4.8, 4: 4.5}),
        ("poor", "STOPPED", {2: 9.0}),
        ("fifth", "STOPPED", {2: 8.0}),
        ("person", "STOPPED", {2: 1.0}),
        ("lost", "FAILED", {2: 1.0}),
        ("runs", "RUNNING", {2: 6.0}),
    )
    board.rows["person"].stopped_by = "me@here"
    order = [row.trial_id for row, _ in chances.candidates(board, asha(9))]
    # Rung 4 has two, of which the better half is `done`; rung 2 has nine, and the best five are good.
    assert order == ["unlucky", "second", "fifth", "poor", "far"]
    (first, why), *_ = chances.candidates(board, asha(9))
    assert (first.trial_id, why) == ("unlucky", "place 3 of 9 at rung 2 in the end")
    assert [row.trial_id for row, _ in chances.candidates(board, asha(2))] == order[:2]
    board.second_chances = 2
    assert list(chances.candidates(board, asha(2))) == []
    assert list(chances.candidates(Board(), asha(2))) == []


def test_exploring_first_all_stop_at_the_first_rung_and_then_the_best_go_on(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for name in "abcde":
        ledger.add(event("planned", stage="search", trial_id=name, method="rigl", total_steps=16, config={}))
    rungs = Rungs(ledger, "search", 16, asha(2, explore_first=True))
    fids = {"a": 5.0, "b": 4.0, "c": 4.5, "d": 4.4}
    for name, fid in fids.items():
        assert rungs.on_trial_result(None, _tune(name), {"step": 2, "fid": fid}) == "STOP"
    assert ledger.board.rows["b"].reason == (
        "place 1 of 2 at step 2: the best of all go on when the search has no new trial"
    )
    assert [row.trial_id for row, _ in chances.candidates(ledger.board, asha(9))] == ["b", "d", "c", "a"]
    for name, fid, decision in (("b", 9.0, "STOP"), ("d", 8.5, "CONTINUE"), ("c", 9.5, "STOP")):
        ledger.add(event("second_chance", stage="search", trial_id=name))
        assert rungs.on_trial_result(None, _tune(name), {"step": 4, "fid": fid}) == decision, name
    reasons = [ledger.board.rows[name].reason for name in "bc"]
    assert reasons == [f"place {n} of {n} at step 4: not among the best 1 in 2" for n in (1, 3)]
    assert rungs.on_trial_result(None, _tune("e"), {"step": 2, "fid": 4.3}) == "STOP", "late, as the others"
    ledger.close()


def test_exploring_first_nobody_goes_on_before_all_have_come_to_the_first_rung(tmp_path: Path) -> None:
    rules, ledger = asha(1, explore_first=True), Ledger(tmp_path)
    for name, method in {"baseline": "dense", "poor": "rigl", "good": "rigl", "lost": "rigl"}.items():
        ledger.add(event("planned", stage="search", trial_id=name, method=method, total_steps=16, config={}))
    rungs = Rungs(ledger, "search", 16, rules)
    listed = Listed(ledger, "search", lambda row: {"trial_id": row.trial_id}, rules)
    assert [listed.suggest(name) for name in ("baseline", "poor", "good", "lost")][-1] == {"trial_id": "lost"}
    rungs.on_trial_result(None, _tune("poor"), {"step": 2, "fid": 9999.0})
    assert listed.suggest("free slot") is None
    rungs.on_trial_result(None, _tune("good"), {"step": 2, "fid": 4.0})
    assert listed.suggest("free slot") is None
    ledger.add(event("failed", stage="search", trial_id="lost", reason="its process was lost"))
    assert listed.suggest("free slot") == {"trial_id": "good"}, "the dense baseline has no rungs to come to"
    ledger.close()


def _tune(name: str) -> Any:
    class Trial:
        trial_id, config = f"tune-{name}", {"trial_id": name}

    return Trial()


@pytest.mark.parametrize("workers", [1, 3, 6, 20])
def test_exploring_first_each_trial_goes_to_the_first_rung_before_any_goes_on(
    sweep_of: Callable[..., Sweep], workers: int
) -> None:
    happened: list[Event] = []
    sweep = chancy(sweep_of, second_chances=14)
    run = simulate(sweep, CURVES, workers=workers, on_event=happened.append)
    first = next(n for n, item in enumerate(happened) if item.kind == "second_chance")
    stopped = [item for item in happened[:first] if item.kind == "stopped"]
    assert len(stopped) == 13  # of 14 one is dense
    assert {item.step for item in stopped} == {2}
    rows = [row for row in run.board.rows.values() if row.method != "dense"]
    best = sorted(rows, key=lambda row: row.fids[2])[:6]  # one in two: each has had its chance
    assert min(len(row.fids) for row in best) > 1
    assert any(row.state == "COMPLETED" for row in best)


def test_a_grid_has_second_chances_too(sweep_of: Callable[..., Sweep]) -> None:
    rules = {"grace_steps": 2, "reduction_factor": 2, "explore_first": True, "second_chances": 2}
    axes = {"static": {"sparsity": [0.1, 0.3, 0.5, 0.7, 0.9]}}
    run = simulate(sweep_of(search=None, grid=axes, asha=rules, confirm=None), CURVES, workers=2)
    # Two are given. The first to come to rung 4 stops there, and as many more are given as it takes to complete one.
    assert run.board.second_chances == 3
    completed = [row.method for row in run.board.rows.values() if row.state == "COMPLETED"]
    assert completed == ["dense", "static"]
    assert not run.board.repeats
    assert {row.state for row in run.board.rows.values()} == {"COMPLETED", "STOPPED"}


def chancy(sweep_of: Callable[..., Sweep], **more: Any) -> Sweep:
    search = {"trials": 14, "axes": {"static": {"sparsity": {"low": 0.1, "high": 0.95}}}}
    rules = {"grace_steps": 2, "reduction_factor": 2, "explore_first": True, "second_chances": 5}
    return sweep_of(search=search, asha=rules | more, confirm=None)


@pytest.mark.parametrize("workers", [1, 3])
def test_chances_are_taken_after_the_last_new_trial_and_no_more_than_given(
    sweep_of: Callable[..., Sweep], workers: int
) -> None:
    happened: list[Event] = []
    run = simulate(chancy(sweep_of), CURVES, workers=workers, on_event=happened.append)
    kinds = [item.kind for item in happened]
    assert kinds.count("planned") == 14
    assert kinds.count("second_chance") == run.board.second_chances == 5
    assert max(n for n, kind in enumerate(kinds) if kind == "planned") < kinds.index("second_chance")
    assert {row.state for row in run.board.rows.values()} == {"COMPLETED", "STOPPED"}
    for row in run.board.rows.values():  # steps never go back, none is paid for twice
        steps = [item.step for item in happened if item.trial_id == row.trial_id and item.fid is not None]
        assert steps == sorted(set(steps))
    assert run.search_steps == sum(row.step for row in run.board.rows.values())
    few = simulate(chancy(sweep_of, second_chances=1), CURVES, workers=workers)
    assert few.search_steps < run.search_steps
    again = simulate(chancy(sweep_of), CURVES, workers=workers)
    assert [row.fids for row in again.board.rows.values()] == [row.fids for row in run.board.rows.values()]


@pytest.mark.parametrize("killed_at", ["first second_chance", "last second_chance", "last planned"])
def test_a_resume_takes_the_chances_that_are_left(
    sweep_of: Callable[..., Sweep], tmp_path: Path, killed_at: str
) -> None:
    """The driver is killed right after an event; what the resumed classes then do is what the undisturbed ones did."""
    sweep = chancy(sweep_of)
    (tmp_path / "whole").mkdir()
    whole = simulate(sweep, CURVES, workers=1, journal=tmp_path / "whole")
    events = list(read(tmp_path / "whole" / "journal.jsonl"))
    which, kind = killed_at.split()
    places = [n for n, item in enumerate(events) if item.kind == kind]
    cut = (places[0] if which == "first" else places[-1]) + 1
    journal = Journal(tmp_path / "journal.jsonl")
    for item in events[:cut]:
        journal.append(item)
    journal.close()

    ledger = Ledger(tmp_path)
    rungs = Rungs(ledger, "search", 8, sweep.asha)
    searcher = Suggested(sweep, ledger, lambda row: {"trial_id": row.trial_id})
    number = 0
    while (config := searcher.suggest(str(number))) != searcher.FINISHED:
        assert isinstance(config, dict)
        row = ledger.board.rows[config["trial_id"]]
        curve = CURVES.curve(row.trial_id, row.config, 0)
        for step, fid in curve[len(row.fids) :]:
            rungs.on_trial_result(None, _tune(row.trial_id), {"step": step, "fid": fid})
            if not row.open:
                break
        searcher.on_trial_complete(str(number))
        number += 1
    assert [(r.trial_id, r.state, r.fids) for r in ledger.board.rows.values()] == [
        (r.trial_id, r.state, r.fids) for r in whole.board.rows.values()
    ]
    trials = searcher.study.get_trials()
    assert len(trials) == 14 + 5 + len([item for item in events if item.kind == "repeated"])
    assert not [trial for trial in trials if trial.state == TrialState.RUNNING]
    ledger.close()
    shutil.rmtree(tmp_path / "whole")


@pytest.mark.parametrize("sparsity", [{"low": 0.1, "high": 0.95}, [0.1, 0.3, 0.4, 0.5, 0.7, 0.8, 0.9]])
@pytest.mark.parametrize("workers", [1, 3])
def test_the_study_of_a_resume_is_the_one_that_was(
    sweep_of: Callable[..., Sweep], tmp_path: Path, workers: int, sparsity: Any
) -> None:
    """To the study a second chance is another trial: what the first one was told stays."""
    search = {"trials": 14, "sampler": "random", "axes": {"static": {"sparsity": sparsity}}}
    rules = {"grace_steps": 2, "reduction_factor": 2, "explore_first": True, "second_chances": 5}
    sweep, storage = sweep_of(search=search, asha=rules, confirm=None), InMemoryStorage()
    run = simulate(sweep, CURVES, workers=workers, journal=tmp_path, storage=storage)
    assert run.board.second_chances >= 5
    assert (len(run.board.repeats) > run.board.second_chances) == isinstance(sparsity, list)
    ledger = Ledger(tmp_path)
    found = Suggested(sweep, ledger, lambda row: {}).study.get_trials()
    ledger.close()
    told = optuna.load_study(study_name=sweep.name, storage=storage).get_trials()
    assert [(t.state, t.values, t.intermediate_values, t.params, t.user_attrs) for t in found] == [
        (t.state, t.values, t.intermediate_values, t.params, t.user_attrs) for t in told
    ]
    steps = [max(t.intermediate_values) for t in found if t.state == TrialState.PRUNED]
    assert min(steps) == 2  # as the first rung left them


def test_old_files_are_the_sweeps_that_they_were(sweep_of: Callable[..., Sweep]) -> None:
    said = {"objectives": ["fid"]}
    tiny = sweep_of().base
    evaluate = {name: value for name, value in tiny["evaluate"].items() if name != "validation_examples"}
    base = sweep_of(base=tiny | {"evaluate": evaluate})
    assert base.search
    spelled = sweep_of(
        base=config.with_value(tiny, "evaluate.validation_examples", 1024),
        search=base.search.model_dump(mode="json") | said,
        asha={"grace_steps": 2, "reduction_factor": 2, "rungs": [], "explore_first": False, "second_chances": 0},
        confirm={"seeds": [1], "front": 6},
    )
    # As the version without these settings had it.
    assert base.digest == spelled.digest == "54f44b0ba64438d0"
    assert chancy(sweep_of).digest != chancy(sweep_of, second_chances=4).digest
    assert space.parse(spelled.model_dump(mode="json"), "again").digest == base.digest
