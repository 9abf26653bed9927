"""What is read out of a board: rungs as the scheduler has them, the best of each method, ids by their beginning."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raysparse.asha import Asha
from raysparse.errors import UsageError
from raysparse.sweep import views
from raysparse.sweep.board import Board, Ledger
from raysparse.sweep.journal import event
from raysparse.sweep.scheduler import Rungs


def board_of(*events: Any) -> Board:
    board = Board()
    for item in events:
        board.apply(item)
    return board


def planned(name: str, method: str = "rigl", stage: str = "search", **more: Any) -> Any:
    config = {"sparse": {}, "seed": more.get("seed", 0)}
    return event("planned", trial_id=name, stage=stage, method=method, total_steps=16, config=config, **more)


@pytest.mark.parametrize("seed", range(8))
def test_the_rungs_that_are_shown_are_the_schedulers(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    asha = Asha(grace_steps=2, reduction_factor=2) if seed % 2 else Asha(rungs=(2, 5, 6, 12), reduction_factor=1.5)
    ledger = Ledger(tmp_path)
    names = [f"t{number}" for number in range(8)]
    for name in names:
        ledger.add(planned(name, method=draw.choice(["dense", "rigl"])))
    rungs = Rungs(ledger, "search", 16, asha)
    for step in (1, 2, 3, 5, 7, 9, 12, 16):
        for name in draw.sample(names, draw.randrange(1, len(names))):
            if ledger.board.rows[name].open:
                trial = SimpleNamespace(config={"trial_id": name}, trial_id=name)
                rungs.on_trial_result(None, trial, {"step": step, "fid": draw.uniform(1, 9)})
    shown = views.rungs(ledger.board, asha, 16)
    assert shown == {step: at for step, at in rungs.rungs.items() if step < 16}
    ledger.close()


def test_the_best_is_completed_or_else_the_furthest_and_seeds_are_averaged() -> None:
    board = board_of(
        planned("a"),
        planned("b"),
        planned("c", "static"),
        planned("d", "static"),
        event("stopped", trial_id="a", step=2, fid=1.0),
        event("completed", trial_id="b", step=16, fid=5.0),
        event("stopped", trial_id="c", step=4, fid=8.0),
        event("stopped", trial_id="d", step=2, fid=3.0),
        *(planned(f"p{seed}", stage="confirm", point={"x": 1}, seed=seed) for seed in (1, 2)),
        *(planned(f"q{seed}", stage="confirm", point={"x": 2}, seed=seed) for seed in (1, 2)),
        event("completed", trial_id="p1", step=16, fid=1.0),  # a lucky seed
        event("completed", trial_id="p2", step=16, fid=9.0),
        event("completed", trial_id="q1", step=16, fid=4.0),
        event("completed", trial_id="q2", step=16, fid=4.5),
    )
    found = {(one["stage"], one["method"]): one for one in views.best(list(board.rows.values()))}
    assert found["search", "rigl"]["trials"] == ["b"]
    assert (found["search", "static"]["trials"], found["search", "static"]["state"]) == (["c"], "STOPPED")
    assert found["confirm", "rigl"]["trials"] == ["q1", "q2"]
    assert (found["confirm", "rigl"]["fid"], found["confirm", "rigl"]["fids"]) == (4.25, [4.0, 4.5])
    assert all(one["protocol"] is None for one in found.values())


def test_a_trial_that_diverged_is_no_ones_best_and_is_not_offered_again() -> None:
    board = board_of(
        planned("a"),
        event("report", trial_id="a", step=2, fid=1.0),
        event("failed", trial_id="a", step=4, reason="loss became nan"),
        planned("b"),
        event("failed", trial_id="b", reason="its process was lost"),
    )
    assert views.best(list(board.rows.values())) == []
    assert (board.rows["a"].diverged, board.rows["b"].diverged) == (True, False)


def test_a_trial_by_the_beginning_of_its_id_or_of_its_hash() -> None:
    board = board_of(planned("rigl-ab12"), planned("rigl-ab12cd"), planned("static-ff00"))
    assert views.pick(board, "rigl-ab12").trial_id == "rigl-ab12", "a whole id is itself"
    assert views.pick(board, "ff").trial_id == views.pick(board, "st").trial_id == "static-ff00"
    with pytest.raises(UsageError, match="2 trials"):
        views.pick(board, "ab1")
    with pytest.raises(UsageError, match="unknown trial"):
        views.pick(board, "12")
