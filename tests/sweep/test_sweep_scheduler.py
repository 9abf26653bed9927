"""ASHA's decisions, and that a killed driver's are continued."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.schedulers import TrialScheduler
from ray.tune.schedulers.async_hyperband import _Bracket

from raysparse.asha import Asha
from raysparse.sweep.board import Ledger
from raysparse.sweep.journal import event
from raysparse.sweep.scheduler import Rung, Rungs, exit_detail, last_line

ASHA = Asha(grace_steps=2, reduction_factor=2)


def plan(ledger: Ledger, *names: str, total_steps: int = 16, method: str = "rigl") -> None:
    for name in names:
        ledger.add(
            event(
                "planned", stage="search", trial_id=name, method=method, total_steps=total_steps, config={"sparse": {}}
            )
        )


def tell(rungs: Rungs, name: str, step: int, fid: float | None, **more: Any) -> str:
    trial = SimpleNamespace(config={"trial_id": name}, trial_id=f"tune-{name}")
    return rungs.on_trial_result(None, trial, {"step": step, "fid": fid, **more})


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path)
    yield opened
    opened.close()


def test_the_worse_half_is_stopped_at_a_rung_and_the_reason_is_on_record(ledger: Ledger) -> None:
    plan(ledger, "a", "b", "c", "d")
    rungs = Rungs(ledger, "search", 16, ASHA)
    assert sorted(rungs.rungs) == [2, 4, 8]
    assert tell(rungs, "a", 2, 10.0) == TrialScheduler.CONTINUE  # the first at a rung always goes on
    assert tell(rungs, "b", 2, 12.0) == TrialScheduler.STOP
    assert tell(rungs, "c", 2, 9.0) == TrialScheduler.CONTINUE
    assert tell(rungs, "d", 2, 10.5) == TrialScheduler.STOP
    row = ledger.board.rows["d"]
    assert (row.state, row.step) == ("STOPPED", 2)
    assert row.reason == "place 3 of 4 at step 2: FID 10.5 above the cutoff 10"
    assert rungs.rungs[2] == {"a": 10.0, "b": 12.0, "c": 9.0, "d": 10.5}


@given(st.lists(st.floats(-1e6, 1e6), max_size=40), st.sampled_from([1.5, 2, 3, 4]))
def test_cutoffs_are_rays_to_the_last_bit(values: list[float], reduction_factor: float) -> None:
    rung, bracket = Rung(), _Bracket(2, 16, reduction_factor, 0)
    for number, value in enumerate(values):
        assert rung.cutoff(reduction_factor) == bracket.cutoff(dict(rung))
        rung[str(number)] = value
        assert rung.place(value) == sum(other > value for other in values[: number + 1]) + 1


def test_the_dense_baseline_is_never_stopped_and_stops_no_other(ledger: Ledger) -> None:
    plan(ledger, "a", "b")
    plan(ledger, "baseline", method="dense")
    rungs = Rungs(ledger, "search", 16, ASHA)
    tell(rungs, "a", 2, 10.0)
    assert tell(rungs, "baseline", 2, 5.0) == tell(rungs, "baseline", 4, 99.0) == TrialScheduler.CONTINUE
    assert rungs.rungs[2] == {"a": 10.0}
    assert tell(rungs, "b", 2, 9.0) == TrialScheduler.CONTINUE
    assert tell(rungs, "baseline", 16, 12.0) == TrialScheduler.STOP
    assert ledger.board.rows["baseline"].state == "COMPLETED"


def test_a_late_fid_is_not_compared_at_a_rung_that_was_jumped_over(ledger: Ledger) -> None:
    plan(ledger, "a", "b")
    rungs = Rungs(ledger, "search", 16, ASHA)
    tell(rungs, "a", 6, 5.0)
    tell(rungs, "a", 7, 4.0)
    assert rungs.rungs == {2: {}, 4: {"a": 5.0}, 8: {}}
    assert tell(rungs, "b", 2, 50.0) == TrialScheduler.CONTINUE


def test_the_last_step_completes_a_trial_and_without_asha_none_is_stopped(ledger: Ledger) -> None:
    plan(ledger, "a", "b")
    rungs = Rungs(ledger, "search", 16, None)
    for step in (2, 4, 8):
        assert tell(rungs, "a", step, 1.0) == tell(rungs, "b", step, 99.0) == TrialScheduler.CONTINUE
    assert tell(rungs, "b", 16, 98.0) == TrialScheduler.STOP
    assert ledger.board.rows["b"].state == "COMPLETED"


def test_a_lost_trial_fails_with_its_reason_and_leaves_no_mark_on_the_rungs(ledger: Ledger) -> None:
    plan(ledger, "a", "b")
    rungs = Rungs(ledger, "search", 16, ASHA)
    assert tell(rungs, "a", 2, None, diverged=True, failed="loss became nan at step 2") == TrialScheduler.STOP
    assert tell(rungs, "b", 0, None, failed="ValueError: no") == TrialScheduler.STOP
    assert rungs.rungs[2] == {}
    a, b = ledger.board.rows["a"], ledger.board.rows["b"]
    assert (a.state, a.reason, a.fids) == ("FAILED", "loss became nan at step 2", {2: None})
    assert (b.state, b.reason, b.fids) == ("FAILED", "ValueError: no", {})


def test_a_lost_process_is_started_again_and_fails_the_trial_in_the_end(ledger: Ledger, tmp_path: Path) -> None:
    plan(ledger, "a")
    rungs = Rungs(ledger, "search", 16, ASHA)
    tell(rungs, "a", 2, 10.0)
    (tmp_path / "error.txt").write_text("Failure # 1\nThe actor died.\n\tWorker exit detail: out of memory\n")
    trial = SimpleNamespace(
        config={"trial_id": "a"}, error_file=str(tmp_path / "error.txt"), should_recover=lambda: again
    )
    again = True
    rungs.on_trial_error(None, trial)
    assert ledger.board.rows["a"].open
    again = False
    rungs.on_trial_error(None, trial)
    row = ledger.board.rows["a"]
    assert (row.state, row.reason, row.step) == ("FAILED", "its process was lost: out of memory", 2)


def test_what_a_restarted_worker_says_again_changes_nothing(ledger: Ledger) -> None:
    plan(ledger, "a", "b")
    rungs = Rungs(ledger, "search", 16, ASHA)
    tell(rungs, "a", 2, 10.0)
    tell(rungs, "a", 4, 8.0)
    before = rungs.rungs
    assert tell(rungs, "a", 2, 10.0) == TrialScheduler.CONTINUE
    assert tell(rungs, "a", 4, 8.0) == TrialScheduler.CONTINUE
    assert rungs.rungs == before
    assert tell(rungs, "b", 2, 11.0) == TrialScheduler.STOP
    assert tell(rungs, "b", 2, 11.0) == TrialScheduler.STOP
    assert [row.state for row in ledger.board.rows.values()] == ["RUNNING", "STOPPED"]


@pytest.mark.parametrize("seed", range(5))
def test_a_driver_killed_after_any_report_decides_as_if_it_never_was(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    curves = {f"t{number}": draw.uniform(1, 9) for number in range(9)}
    order = [(name, step) for step in (2, 4, 6, 8, 12, 16) for name in draw.sample(sorted(curves), len(curves))]

    def decisions(folder: Path, kill: bool) -> list[str]:
        folder.mkdir()
        ledger, said = Ledger(folder), []
        plan(ledger, *curves)
        rungs = Rungs(ledger, "search", 16, ASHA)
        for name, step in order:
            if not ledger.board.rows[name].open:
                continue
            if kill:
                ledger.close()
                ledger = Ledger(folder)
                rungs = Rungs(ledger, "search", 16, ASHA)
            said.append(f"{name} {step} {tell(rungs, name, step, curves[name] + 20 / step)}")
        ledger.close()
        return said

    undisturbed = decisions(tmp_path / "whole", kill=False)
    assert any(said.endswith("STOP") and " 16 " not in said for said in undisturbed)
    assert decisions(tmp_path / "killed", kill=True) == undisturbed


def test_how_a_process_ended_in_few_words() -> None:
    assert exit_detail("The actor died.\n\tWorker exit detail: out of memory. Some common causes: x") == "out of memory"
    gone = (
        "The actor 548d is unavailable: RpcError: RPC error: failed to connect to all addresses; rpc_code: 14. The task"
    )
    assert exit_detail(gone) == "neither it nor its node answers"
    killed = "2 worker(s) were killed due to the node running low on memory."
    assert exit_detail(killed) == "Ray killed it because memory ran low"
    killed += " Memory on the node (IP: 192.0.2.2, ID: 889) was 6.79GB used / 23.54GB limit (0.288)\nRefer to: x"
    assert exit_detail(killed) == "Ray killed it because memory ran low (6.79GB used / 23.54GB limit)"


def test_the_last_line_that_says_something() -> None:
    assert last_line(ValueError("one\ntwo\n\n")) == "two"
    assert last_line(KeyError()) == "KeyError"
