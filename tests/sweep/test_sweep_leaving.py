"""A trial's process that leaves before its end: paused by the driver, its node taken away, dying again and again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from raysparse import space
from raysparse.space import Sweep
from raysparse.sweep import leaving
from raysparse.sweep.board import Ledger
from raysparse.sweep.journal import event
from raysparse.sweep.search import planned
from raysparse.sweep.trainable import train_rank
from raysparse.train import setup, state

POINT = {"method": "rigl", "sparsity": 0.5, "prune_ratio": 0.5, "update_interval": 2}


@pytest.fixture
def told(tmp_path: Path, sweep_of: Callable[..., Sweep], ray_home: Path) -> dict[str, Any]:
    """What Tune tells a trial's process, with the data prepared."""
    trial = space.trial(sweep_of(), POINT)
    setup.prepare_data(trial)
    folder = tmp_path / "trials" / trial.trial_id
    folder.mkdir(parents=True)
    (folder / "trial.json").write_text(trial.dump_json())
    return {"trial_id": trial.trial_id, "results": str(tmp_path)}


def run(told: dict[str, Any], at: int | None = None, act: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
    """Train and collect what is said; `act` is called when step `at` is said."""
    said: list[dict[str, Any]] = []

    def say(metrics: dict[str, Any]) -> None:
        said.append(metrics)
        if metrics["step"] == at:
            act()

    train_rank(told, say)
    return said


def fids(said: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(metrics["step"], metrics["fid"]) for metrics in said]


def test_a_paused_trial_saves_waits_and_goes_on_to_the_same_bits(
    told: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaving, "LOOK_S", 0.0)
    folder, checkpoints = tmp_path / "trials" / told["trial_id"], tmp_path / "checkpoints" / told["trial_id"]

    def end_the_pause() -> None:
        while not (folder / leaving.PAUSED).exists():
            time.sleep(0.01)
        leaving.forget(tmp_path)

    waiting = threading.Thread(target=end_the_pause)
    waiting.start()
    first = run(told, 4, lambda: (tmp_path / leaving.PAUSE).touch())
    waiting.join()
    assert [metrics["step"] for metrics in first] == [2, 4, 0]  # the last: nobody ended it, so it says so
    assert "did not end it" in first[-1]["failed"]
    saved = state.latest(checkpoints)
    assert saved is not None
    assert state.manifest(saved)["step"] == 5  # between two reports
    assert (folder / leaving.PAUSED).read_text() == "5\n"
    assert not (folder / leaving.STARTS).exists()

    again = run(told)
    assert [metrics["step"] for metrics in again] == [2, 4, 6, 8]
    for path in checkpoints.iterdir():
        path.rename(path.with_name(f"old-{path.name}"))
    (folder / "reports.jsonl").unlink()
    assert fids(run(told)) == fids(again)  # undisturbed, from the start


def test_a_trial_whose_node_goes_saves_itself_and_raises(
    told: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaving, "NOTICE_S", 0.0)
    notices: list[bool] = []
    monkeypatch.setattr(leaving, "node_goes", lambda: bool(notices))
    with pytest.raises(leaving.NodeGoes, match="saved at step 3"):
        run(told, 2, lambda: notices.append(True))
    saved = state.latest(tmp_path / "checkpoints" / told["trial_id"])
    assert saved is not None
    assert state.manifest(saved)["step"] == 3
    notices.clear()
    assert [metrics["step"] for metrics in run(told)] == [2, 4, 6, 8]


class Killed(BaseException):
    """Ends a trial where it stands, as a lost machine does."""


def test_machines_may_be_lost_without_end_but_a_trial_that_gets_nowhere_fails(
    told: dict[str, Any], tmp_path: Path
) -> None:
    def die() -> None:
        raise Killed

    for step in (2, 4, 6):  # further each time
        with pytest.raises(Killed):
            run(told, step, die)
    for _ in range(leaving.STARTS_LIMIT - 1):  # and now nowhere: the start that got to 6 counts as one from 4
        with pytest.raises(Killed):
            run(told, 2, die)
    assert [metrics["step"] for metrics in run(told)] == [2, 4, 6, 8]  # the last of its starts

    path = tmp_path / "trials" / told["trial_id"]
    for _ in range(leaving.STARTS_LIMIT):
        assert leaving.count_start(path, 8) is None
    assert str(leaving.count_start(path, 8)).startswith("its process ended 3 times at or after step 8")
    assert leaving.count_start(path, 8) is None  # a person has tried it again


def test_a_start_that_ended_with_its_driver_is_no_death_of_the_trial(
    tmp_path: Path, sweep_of: Callable[..., Sweep]
) -> None:
    trial = space.trial(sweep_of(), {"method": "static", "sparsity": 0.5})
    path = tmp_path / "trials" / trial.trial_id
    for _ in range(leaving.STARTS_LIMIT + 2):
        ledger = Ledger(tmp_path)
        if not ledger.board.rows:
            ledger.add(planned(trial, {"method": "static", "sparsity": 0.5}, "search"))
        ledger.add(event("started", stage="search", trial_id=trial.trial_id))
        assert leaving.count_start(path, 0) is None
        ledger.close()  # the driver is killed: nothing says that the trial has ended
    with closing(Ledger(tmp_path)):
        for _ in range(leaving.STARTS_LIMIT):
            assert leaving.count_start(path, 0) is None
        assert leaving.count_start(path, 0) is not None, "deaths under one driver count"
    leaving.forgive_start(tmp_path / "never started")


def test_a_wish_is_looked_for_rarely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(leaving, "LOOK_S", 600.0)
    monkeypatch.setattr(leaving, "NOTICE_S", 600.0)
    wish = leaving.Wish(tmp_path, lambda: bool(asked.append(1)))
    assert not any(wish() for _ in range(1000))
    assert len(asked) == 1
    (tmp_path / leaving.PAUSE).touch()
    assert not wish()
    monkeypatch.setattr(leaving, "LOOK_S", 0.0)
    assert wish()
    leaving.forget(tmp_path)
    assert wish()  # once it is to leave, it leaves


def test_a_driver_waits_for_the_answers_of_those_that_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted: list[bool] = []
    asked: list[int] = []
    pause = leaving.Pause(tmp_path, lambda: bool(interrupted), lambda: ["a", "b"], lambda: asked.append(1))
    for name in ("a", "b"):
        (tmp_path / "trials" / name).mkdir(parents=True)
        (tmp_path / "trials" / name / leaving.PAUSED).write_text("7\n")  # of an earlier pause
    assert not pause()
    assert not (tmp_path / leaving.PAUSE).exists()
    interrupted.append(True)
    assert not pause()
    assert (tmp_path / leaving.PAUSE).exists()
    for name, over in (("a", False), ("b", True)):
        (tmp_path / "trials" / name / leaving.PAUSED).write_text("9\n")
        assert pause() is over
    assert asked == [1]

    monkeypatch.setattr(leaving, "ANSWER_S", -1.0)
    late = leaving.Pause(tmp_path, lambda: True, lambda: ["a"])
    assert late()
