"""Who is confirmed, and that it is chosen once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from raysparse import space
from raysparse.space import Confirm, Sweep
from raysparse.sweep import confirm
from raysparse.sweep.board import Ledger
from raysparse.sweep.journal import event
from raysparse.sweep.search import planned


def searched(folder: Path, sweep: Sweep, ends: list[tuple[dict[str, Any], str, int, float | None]]) -> Ledger:
    ledger = Ledger(folder)
    for point, kind, step, fid in ends:
        trial = space.trial(sweep, point)
        ledger.add(planned(trial, point, "search"))
        ledger.add(event(kind, stage="search", trial_id=trial.trial_id, step=step, fid=fid))  # type: ignore[arg-type]
    return ledger


def static(sparsity: float) -> dict[str, Any]:
    return {"method": "static", "sparsity": sparsity}


def rigl(sparsity: float) -> dict[str, Any]:
    return {"method": "rigl", "sparsity": sparsity}


def test_the_best_completed_of_each_method_and_dense_on_every_seed(
    tmp_path: Path, sweep_of: Callable[..., Sweep]
) -> None:
    sweep = sweep_of(confirm={"seeds": [1, 2]})
    ends = [
        ({"method": "dense"}, "completed", 8, 3.0),
        (static(0.5), "completed", 8, 5.0),
        (static(0.75), "completed", 8, 4.0),
        (static(0.9), "stopped", 4, 1.0),  # better, but not to the end
        (rigl(0.5), "stopped", 2, 1.0),
        (rigl(0.9), "stopped", 4, 7.0),
    ]
    ledger = searched(tmp_path, sweep, ends)
    confirm.plan(sweep, ledger)
    assert [item.point for item in ledger.board.chosen] == [{"method": "dense"}, static(0.75), rigl(0.9)]
    assert "place 1 of 2 completed trials of static" in str(ledger.board.chosen[1].reason)
    assert "no trial of rigl was completed" in str(ledger.board.chosen[2].reason)
    rows = ledger.board.of_stage("confirm")
    assert len(rows) == 6
    assert {(row.method, row.seed) for row in rows} == {(m, s) for m in ("dense", "static", "rigl") for s in (1, 2)}
    ledger.close()


def test_a_resume_does_not_choose_anew(tmp_path: Path, sweep_of: Callable[..., Sweep]) -> None:
    sweep = sweep_of()
    ledger = searched(tmp_path, sweep, [({"method": "dense"}, "completed", 8, 3.0), (static(0.5), "completed", 8, 4.0)])
    ledger.add(event("chosen", stage="confirm", trial_id=space.trial(sweep, static(0.5)).trial_id, point=static(0.5)))
    ledger.close()  # killed between two choices
    ledger = Ledger(tmp_path)
    confirm.plan(sweep, ledger)
    confirm.plan(sweep, ledger)
    assert sorted(item.point["method"] for item in ledger.board.chosen if item.point) == ["dense", "static"]
    assert len(ledger.board.of_stage("confirm")) == 2
    ledger.close()


def test_a_better_one_that_is_tried_again_is_confirmed_where_there_is_room(
    tmp_path: Path, sweep_of: Callable[..., Sweep]
) -> None:
    sweep = sweep_of(confirm={"seeds": [1, 2]})
    ends = [
        ({"method": "dense"}, "completed", 8, 3.0),
        (rigl(0.5), "completed", 8, 4.0),
        (rigl(0.9), "failed", 2, None),
    ]
    ledger = searched(tmp_path, sweep, ends)
    confirm.plan(sweep, ledger)
    later = space.trial(sweep, rigl(0.9)).trial_id
    ledger.add(event("reopened", stage="search", trial_id=later))
    ledger.add(event("completed", stage="search", trial_id=later, step=8, fid=2.0))
    confirm.plan(sweep, ledger)
    assert [item.point for item in ledger.board.chosen] == [{"method": "dense"}, rigl(0.5)]
    assert len(ledger.board.of_stage("confirm")) == 4
    confirm.plan(sweep_of(confirm={"seeds": [1, 2], "best_per_method": 2}), ledger)
    assert [item.point for item in ledger.board.chosen][2:] == [rigl(0.9)]
    assert str(ledger.board.chosen[2].reason) == "place 1 of 2 completed trials of rigl, FID 2"
    assert len(ledger.board.of_stage("confirm")) == 6
    ledger.close()


def test_what_more_trials_find_is_confirmed_where_it_is_better(tmp_path: Path, sweep_of: Callable[..., Sweep]) -> None:
    sweep = sweep_of(confirm={"seeds": [1, 2]})
    ends: list[tuple[dict[str, Any], str, int, float | None]] = [
        ({"method": "dense"}, "completed", 8, 3.0),
        (rigl(0.5), "completed", 8, 4.0),
        (static(0.5), "completed", 8, 4.0),
        (static(0.25), "failed", 2, None),
    ]
    ledger = searched(tmp_path, sweep, ends)
    confirm.plan(sweep, ledger)
    ledger.add(event("accepted", reason="search.trials 4 then, 6 now"))
    assert [item.point for item in ledger.board.chosen] == [{"method": "dense"}, rigl(0.5), static(0.5)]
    confirm.plan(sweep, ledger)
    assert len(ledger.board.chosen) == 3  # nothing new yet
    for point, fid in ((rigl(0.9), 2.0), (rigl(0.75), 3.0), (static(0.9), 5.0)):
        trial = space.trial(sweep, point)
        ledger.add(planned(trial, point, "search"))
        ledger.add(event("completed", stage="search", trial_id=trial.trial_id, step=8, fid=fid))
    ledger.close()
    ledger = Ledger(tmp_path)  # killed; the journal says that the sweep was changed
    confirm.plan(sweep, ledger)
    assert [item.point for item in ledger.board.chosen][3:] == [rigl(0.9)]
    assert str(ledger.board.chosen[3].reason) == "place 1 of 3 completed trials of rigl, FID 2"
    assert len(ledger.board.of_stage("confirm")) == 8
    ledger.add(event("finished"))
    # What a retry finds, and what is accepted of other versions alone, is no change of the sweep.
    ledger.add(event("completed", stage="search", trial_id=space.trial(sweep, static(0.25)).trial_id, step=8, fid=1.0))
    ledger.add(event("accepted", stage="confirm", reason="torch 2.14 then, 2.15 now"))
    confirm.plan(sweep, ledger)
    assert len(ledger.board.chosen) == 4
    ledger.close()


def test_failed_trials_are_not_confirmed_and_the_dense_baseline_always_is(
    tmp_path: Path, sweep_of: Callable[..., Sweep]
) -> None:
    sweep = sweep_of()
    ledger = searched(tmp_path, sweep, [({"method": "dense"}, "failed", 2, None), (rigl(0.5), "failed", 2, None)])
    confirm.plan(sweep, ledger)
    assert not ledger.board.chosen
    assert [row.method for row in ledger.board.of_stage("confirm")] == ["dense"]
    ledger.close()


def test_several_of_a_method(tmp_path: Path, sweep_of: Callable[..., Sweep]) -> None:
    sweep = sweep_of()
    ends = [(static(s), "completed", 8, fid) for s, fid in ((0.5, 3.0), (0.75, 1.0), (0.9, 2.0))]
    ledger = searched(tmp_path, sweep, ends)
    found = [
        row.fid for row, _ in confirm.choose(ledger.board.of_stage("search"), Confirm(seeds=(1,), best_per_method=2))
    ]
    assert found == [1.0, 2.0]
    ledger.close()
