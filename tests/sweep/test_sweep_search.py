"""The search without Ray's processes: what the study is told, what is asked, and a resume that changes nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from raysparse import space
from raysparse.errors import UsageError
from raysparse.space import Sweep
from raysparse.sweep.axes import all_points, distributions, first_points, new_point, to_params, to_point
from raysparse.sweep.board import Ledger, Row
from raysparse.sweep.journal import event, read
from raysparse.sweep.search import Listed, Suggested, planned
from raysparse.train import setup

WIDE = {
    "trials": 40,
    "axes": {
        "dense": {},
        "static": {"sparsity": [0.5, 0.75, 0.9]},
        "rigl": {
            "sparsity": {"low": 0.5, "high": 0.95, "step": 0.05},
            "prune_ratio": {"low": 0.05, "high": 0.5, "log": True},
            "update_interval": {"low": 100, "high": 1100, "step": 100},
            "optimizer.betas": [[0.9, 0.999], [0.9, 0.99]],
        },
    },
    "seed_points": [{"method": "rigl", "sparsity": 0.5, "prune_ratio": 0.5}],
}


def config_of(row: Row) -> dict[str, Any]:
    return {"trial_id": row.trial_id}


def end(ledger: Ledger, search: Suggested, tune_id: str, kind: Any, **fields: Any) -> None:
    """What the scheduler and Tune do at a trial's end."""
    row = ledger.board.rows[search._ours[tune_id]]
    ledger.add(event(kind, stage="search", trial_id=row.trial_id, **fields))
    search.on_trial_complete(tune_id, {"fid": fields.get("fid")})


def fid_of(row: Row) -> float:
    return 10 + 5 * abs((row.setting("sparsity") or 0) - 0.7) + 3 * (row.setting("prune_ratio") or 0)


def walk(ledger: Ledger, search: Suggested, count: int, first: int = 0) -> list[str]:
    """Ask and end `count` trials, one after the other; every fourth is stopped, every seventh fails."""
    asked = []
    for number in range(first, first + count):
        config = search.suggest(f"tune{number}")
        if config == search.FINISHED:
            break
        assert isinstance(config, dict)
        asked.append(config["trial_id"])
        row = ledger.board.rows[config["trial_id"]]
        if number % 7 == 6:
            end(ledger, search, f"tune{number}", "failed", reason="loss became nan")
        elif number % 4 == 3:
            end(ledger, search, f"tune{number}", "stopped", step=2, fid=fid_of(row) + 4)
        else:
            ledger.add(event("report", stage="search", trial_id=row.trial_id, step=2, fid=fid_of(row) + 4))
            search.on_trial_result(f"tune{number}", {"fid": fid_of(row) + 4})
            end(ledger, search, f"tune{number}", "completed", step=8, fid=fid_of(row))
    return asked


@pytest.fixture
def ledger(tmp_path: Path) -> Any:
    with_file = Ledger(tmp_path)
    yield with_file
    with_file.close()


def test_points_and_parameters_are_the_same_thing(sweep_of: Callable[..., Sweep]) -> None:
    search = sweep_of(search=WIDE).search
    assert search
    point = {
        "method": "rigl",
        "sparsity": 0.5,
        "prune_ratio": 0.1,
        "update_interval": 300,
        "optimizer.betas": (0.9, 0.99),
    }
    params = to_params(search, point)
    assert params["rigl.sparsity"] == 0.5
    assert to_point(search, params)["update_interval"] == 300
    assert space.trial(sweep_of(search=WIDE), to_point(search, params)).optimizer.betas == (0.9, 0.99)
    assert set(distributions(search)) == {
        "method",
        "static.sparsity",
        *(f"rigl.{name}" for name in WIDE["axes"]["rigl"]),
    }
    assert to_params(search, {"method": "dense"}) == {}


def test_a_range_with_whole_ends_has_what_lies_between(ledger: Ledger, sweep_of: Callable[..., Sweep]) -> None:
    axes = {"rigl": {"optimizer.clip_norm": {"low": 1, "high": 10}, "update_interval": {"low": 1, "high": 10}}}
    search = Suggested(sweep_of(search={"trials": 6, "sampler": "random", "axes": axes}), ledger, config_of)
    walk(ledger, search, 6)
    points = [row.point for row in ledger.board.rows.values() if row.method == "rigl"]
    assert any(point["optimizer.clip_norm"] % 1 for point in points)
    assert all(isinstance(point["update_interval"], int) for point in points)


def test_a_search_that_drew_whole_numbers_of_such_a_range_goes_on(
    ledger: Ledger, sweep_of: Callable[..., Sweep]
) -> None:
    """As versions did that went by how the ends are written."""
    sweep = sweep_of(search={"trials": 3, "axes": {"rigl": {"optimizer.clip_norm": {"low": 1, "high": 10}}}})
    point = {"method": "rigl", "optimizer.clip_norm": 7}
    ledger.add(planned(space.trial(sweep, point), point, "search", 0))
    search = Suggested(sweep, ledger, config_of)
    assert search.study.get_trials()[0].params == {"method": "rigl", "rigl.optimizer.clip_norm": 7}
    assert len(walk(ledger, search, 3)) == 3


def test_dense_comes_first_then_the_seed_points_then_the_methods_not_met(sweep_of: Callable[..., Sweep]) -> None:
    search = sweep_of(search=WIDE).search
    assert search
    assert first_points(search) == [{"method": "dense"}, dict(WIDE["seed_points"][0]), {"method": "static"}]
    assert all_points(search) is None  # a range has no end
    axes = {"rigl": {"sparsity": [0.5]}, "static": {}, "dense": {}}
    search = sweep_of(search={"trials": 3, "axes": axes, "seed_points": [{"method": "static"}]}).search
    assert search
    assert first_points(search) == [{"method": "dense"}, {"method": "static"}, {"method": "rigl"}]
    assert all_points(search) == [{"method": "rigl", "sparsity": 0.5}, {"method": "static"}, {"method": "dense"}]


def test_the_study_learns_what_happened(ledger: Ledger, sweep_of: Callable[..., Sweep]) -> None:
    search = Suggested(sweep_of(search=WIDE), ledger, config_of)
    walk(ledger, search, 8)
    trials = search.study.get_trials()
    rows = list(ledger.board.rows.values())
    by_number = {row.number: row for row in rows}
    assert {trial.state for trial in trials} == {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL}
    for trial in trials:
        row = by_number.get(trial.number)
        if row is None:
            continue
        assert trial.user_attrs["trial_id"] == row.trial_id
        expected = {"COMPLETED": TrialState.COMPLETE, "STOPPED": TrialState.PRUNED, "FAILED": TrialState.FAIL}
        assert trial.state == expected[row.state]
        assert trial.intermediate_values == row.fids
        assert trial.value == row.fid  # of a stopped trial: its last intermediate value


def test_a_point_asked_for_again_is_not_trained_again(ledger: Ledger, sweep_of: Callable[..., Sweep]) -> None:
    axes = {"dense": {}, "static": {"sparsity": [0.5, 0.75]}}
    search = Suggested(sweep_of(search={"trials": 9, "axes": axes}), ledger, config_of)
    asked = walk(ledger, search, 9)
    assert len(asked) == len(set(asked)) == 3, "the space has three points"
    assert ledger.board.repeats
    for repeat in ledger.board.repeats:
        told, row = search.study.get_trials()[repeat.number], ledger.board.rows[repeat.trial_id]
        assert (told.state, told.value) == (TrialState.COMPLETE, row.fid)


def test_methods_that_are_one_point_each_are_a_space_that_ends(ledger: Ledger, sweep_of: Callable[..., Sweep]) -> None:
    search = Suggested(
        sweep_of(search={"trials": 5, "axes": {"dense": {}, "static": {}, "rigl": {}}}), ledger, config_of
    )
    asked = walk(ledger, search, 5)
    assert [name.split("-")[0] for name in asked] == ["dense", "static", "rigl"]
    assert [item.reason for item in read(ledger._journal.path) if item.kind == "note"] == [
        "every point of the space has been tried"
    ]
    assert Suggested(search._sweep, ledger, config_of).suggest("again") == search.FINISHED


def settled(ledger: Ledger, search: Suggested, count: int) -> list[str]:
    """Ask and complete `count` trials, of which static's are by far the best."""
    for number in range(count):
        config = search.suggest(str(number))
        assert isinstance(config, dict), "it ended early"
        row = ledger.board.rows[config["trial_id"]]
        end(ledger, search, str(number), "completed", step=8, fid=fid_of(row) - 5 * (row.method == "static"))
    return list(ledger.board.rows)


def test_a_search_that_settles_on_few_points_goes_on_with_new_ones(
    tmp_path: Path, sweep_of: Callable[..., Sweep]
) -> None:
    sweep = sweep_of(search=WIDE | {"sampler": "tpe"})
    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
    whole, resumed = Ledger(tmp_path / "whole"), Ledger(tmp_path / "resumed")
    names = settled(whole, Suggested(sweep, whole, config_of), 28)
    assert len(set(names)) == 28
    assert len(whole.board.repeats) > 60, "static's three points, again and again"
    settled(resumed, Suggested(sweep, resumed, config_of), 24)
    assert settled(resumed, Suggested(sweep, resumed, config_of), 4) == names
    whole.close()
    resumed.close()


def test_every_point_is_found_once_and_then_none(sweep_of: Callable[..., Sweep]) -> None:
    ranges = {"sparsity": {"low": 0.5, "high": 0.95, "step": 0.05}, "update_interval": {"low": 2, "high": 8, "step": 2}}
    axes = {"dense": {}, "static": {"sparsity": [0.5, 0.75]}, "rigl": ranges}
    search = sweep_of(search={"trials": 9, "axes": axes}).search
    assert search
    found: list[str] = []
    while point := new_point(search, len(found), lambda point: str(point) in found):
        found.append(str(point))
    assert len(found) == 1 + 2 + 10 * 4


def test_a_repeat_of_a_running_trial_is_told_when_that_one_ends(ledger: Ledger, sweep_of: Callable[..., Sweep]) -> None:
    axes = {"static": {"sparsity": [0.5]}, "rigl": {"sparsity": [0.5, 0.9]}}
    search = Suggested(sweep_of(search={"trials": 9, "axes": axes}), ledger, config_of)
    tune_ids = []
    for number in range(9):
        if search.suggest(str(number)) is None:
            break
        tune_ids.append(str(number))
    assert len(tune_ids) == 4  # dense was added
    assert any(trial.state == TrialState.RUNNING for trial in search.study.get_trials())
    for tune_id in tune_ids:
        end(ledger, search, tune_id, "completed", step=8, fid=1.0)
    assert {trial.state for trial in search.study.get_trials()} == {TrialState.COMPLETE}


HOLES: dict[str, Any] = {
    "trials": 40,
    "axes": {
        "static": {"sparsity": {"low": 0.1, "high": 0.9}, "train.batch_size": [8, 12], "train.accumulate": [1, 8]},
        "rigl": {"train.batch_size": [8, 12], "train.accumulate": [1, 8], "prune_ratio": [0.1, 0.2, 0.3, 0.4, 0.5]},
    },
}


def test_settings_that_do_not_go_together_are_told_the_sampler_and_others_drawn(
    ledger: Ledger, sweep_of: Callable[..., Sweep]
) -> None:
    axes = {"rigl": HOLES["axes"]["rigl"]}
    search = Suggested(sweep_of(search=HOLES | {"axes": axes}), ledger, config_of)
    assert len(walk(ledger, search, 40)) == 1 + 15, "dense, and of 20 points those that are trials"
    refused = [item for item in read(ledger._journal.path) if item.kind == "refused"]
    assert refused
    assert ledger.board.refused == [item.number for item in refused]
    for item in refused:
        assert item.point
        assert (item.point["train.batch_size"], item.point["train.accumulate"]) == (12, 8)
        assert "12 is not a multiple of accumulate 8" in str(item.reason)
        assert search.study.get_trials()[item.number or 0].state == TrialState.FAIL
    (said,) = [item.reason for item in read(ledger._journal.path) if item.kind == "note"]
    assert "every point of the space has been tried, or is of settings that do not go together" in str(said)


@pytest.mark.parametrize("space_of", [WIDE, HOLES], ids=["wide", "with holes"])
@pytest.mark.parametrize("sampler", ["tpe", "random", "tpe of two objectives"])
@pytest.mark.parametrize("killed_after", [1, 5, 17])
def test_a_resumed_search_asks_what_the_undisturbed_one_asks(
    tmp_path: Path, sweep_of: Callable[..., Sweep], space_of: dict[str, Any], sampler: str, killed_after: int
) -> None:
    objectives = ["fid", "flops_inference"] if "two" in sampler else ["fid"]
    sweep = sweep_of(search=space_of | {"sampler": sampler.split()[0], "objectives": objectives})
    for name in ("whole", "killed", "resumed"):
        (tmp_path / name).mkdir()
    whole = Ledger(tmp_path / "whole")
    undisturbed = walk(whole, Suggested(sweep, whole, config_of), 22)

    killed = Ledger(tmp_path / "killed")
    search = Suggested(sweep, killed, config_of)
    walk(killed, search, killed_after)
    search.suggest("open")  # planned and on record, but not begun
    search.study.ask()  # asked, but not on record: the kill came in between
    killed.close()

    shutil.copy(tmp_path / "killed" / "journal.jsonl", tmp_path / "resumed")
    resumed = Ledger(tmp_path / "resumed")
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "study.log")))
    search = Suggested(sweep, resumed, config_of, storage)
    assert search.study.get_trials()[-1].state == TrialState.RUNNING  # the open one, and no other
    rest = walk(resumed, search, 22 - killed_after, first=killed_after)
    assert undisturbed[killed_after:] == rest
    assert whole.board.refused == resumed.board.refused
    assert bool(whole.board.refused) == (space_of is HOLES)
    assert list(whole.board.rows) == list(resumed.board.rows)
    assert [row.costs for row in whole.board.rows.values()] == [row.costs for row in resumed.board.rows.values()]
    assert not [trial for trial in search.study.get_trials() if not trial.state.is_finished()]
    whole.close()
    resumed.close()


def test_a_trial_that_fails_its_check_is_not_handed_out(ledger: Ledger, sweep_of: Callable[..., Sweep]) -> None:
    def check(trial: Any) -> None:
        if trial.sparse.sparsity == 0.75:
            raise UsageError("no such thing")

    axes = {"static": {"sparsity": [0.5, 0.75, 0.9]}}
    search = Suggested(sweep_of(search={"trials": 4, "axes": axes}), ledger, config_of, check=check)
    walk(ledger, search, 4)
    failed = [row for row in ledger.board.rows.values() if row.state == "FAILED"]
    assert [row.reason for row in failed] == ["no such thing"]
    assert len(ledger.board.rows) == 4


@pytest.mark.parametrize("objectives", [("fid",), ("fid", "flops_inference")])
def test_a_point_that_leaves_a_layer_no_weight_fails_alone(
    objectives: tuple[str, ...], ledger: Ledger, sweep_of: Callable[..., Sweep]
) -> None:
    axes = {"static": {"sparsity": [0.5, 0.9999, 0.9]}}
    search = {"trials": 4, "axes": axes, "objectives": objectives}
    asha = None if len(objectives) > 1 else {"grace_steps": 2, "reduction_factor": 2}
    suggested = Suggested(sweep_of(search=search, asha=asha), ledger, config_of, check=setup.check)
    walk(ledger, suggested, 4)
    assert len(ledger.board.rows) == 4
    (failed,) = [row for row in ledger.board.rows.values() if row.state == "FAILED"]
    assert (failed.setting("sparsity"), "each layer keeps at least one" in failed.reason) == (0.9999, True)
    again = Suggested(sweep_of(search=search, asha=asha), ledger, config_of, check=setup.check)
    assert again.study.get_trials()[failed.number].state.name == "FAIL"


def test_a_list_hands_out_what_is_open(ledger: Ledger, sweep_of: Callable[..., Sweep]) -> None:
    sweep = sweep_of()
    for sparsity in (0.5, 0.75, 0.9):
        point = {"method": "static", "sparsity": sparsity}
        ledger.add(planned(space.trial(sweep, point), point, "search"))
    first, second, third = ledger.board.rows
    ledger.add(event("completed", stage="search", trial_id=second, step=8, fid=1.0))
    listed = Listed(ledger, "search", config_of)
    assert [listed.suggest(name) for name in "abc"] == [{"trial_id": first}, {"trial_id": third}, None]
    ledger.add(event("completed", stage="search", trial_id=first, step=8, fid=1.0))
    listed.on_trial_complete("a")
    listed.on_trial_complete("b", error=True)  # Tune has given it up, and nothing is on record
    assert [listed.suggest(name) for name in "de"] == [{"trial_id": third}, None]
    ledger.add(event("failed", stage="search", trial_id=third, reason="lost"))
    listed.on_trial_complete("d", error=True)
    assert listed.suggest("f") == listed.FINISHED


def test_a_search_hands_out_again_what_tune_has_given_up(ledger: Ledger, sweep_of: Callable[..., Sweep]) -> None:
    search = Suggested(sweep_of(search=WIDE), ledger, config_of)
    given = search.suggest("a")
    search.on_trial_complete("a", error=True)
    assert search.suggest("b") == given
    assert search.suggest("c") != given
