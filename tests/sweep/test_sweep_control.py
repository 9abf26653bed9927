"""What a person asks of a sweep: with a driver that runs, without one, and where it makes no sense."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from optuna.trial import TrialState
from ray.tune.schedulers import TrialScheduler

from raysparse.asha import Asha
from raysparse.errors import UsageError
from raysparse.space import Sweep
from raysparse.sweep import control, folder
from raysparse.sweep.board import Board, Ledger
from raysparse.sweep.journal import event, read
from raysparse.sweep.scheduler import Rungs
from raysparse.sweep.search import Suggested
from raysparse.train import claims


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A sweep whose driver is gone: a runs, b waits, c failed after a report, d was stopped by ASHA, e is done."""
    (tmp_path / "sweep.json").write_text("{}")
    (tmp_path / "lock").write_text(f"process 1 on not-{platform.node()}\n")
    os.utime(tmp_path / "lock", (0, 0))
    ledger = Ledger(tmp_path)
    for name in "abcde":
        ledger.add(
            event("planned", stage="search", trial_id=name, method="rigl", total_steps=16, config={"sparse": {}})
        )
    ledger.add(event("started", trial_id="a", step=0))
    ledger.add(event("report", trial_id="a", step=2, fid=5.0))
    ledger.add(event("report", trial_id="c", step=2, fid=6.0))
    ledger.add(event("failed", trial_id="c", step=4, reason="loss became nan"))
    ledger.add(event("stopped", trial_id="d", step=2, fid=9.0, reason="FID 9 above the cutoff"))
    ledger.add(event("completed", trial_id="e", step=16, fid=1.0))
    ledger.close()
    return tmp_path


def driving(results: Path) -> subprocess.Popen[str]:
    """Another process that holds the sweep's lock."""
    code = f"""
import time
from pathlib import Path
from raysparse.sweep import folder
with folder.locked(Path({str(results)!r})):
    print("locked", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def test_a_driver_ends_the_trial_at_its_next_report_and_the_rung_keeps_its_fid(results: Path) -> None:
    process = driving(results)
    try:
        assert control.driver(results).state == "running"
        assert "at its next report (now at step 2 of 16)" in control.stop(results, "a")
        assert "after its first report" in control.stop(results, "b")
        with pytest.raises(UsageError, match=r"another process drives .*resume"):
            control.retry(results, ["c"])
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]
    assert control.driver(results).state == "gone"
    assert list(read(results / "journal.jsonl"))[-1].kind == "completed", "only the driver writes the journal"

    ledger = Ledger(results)
    asked = lambda trial_id: control.stop_asked_by(results, trial_id)  # noqa: E731
    rungs = Rungs(ledger, "search", 16, Asha(grace_steps=2, reduction_factor=2), asked)
    trial = SimpleNamespace(config={"trial_id": "a"}, trial_id="tune-a")
    assert rungs.on_trial_result(None, trial, {"step": 4, "fid": 4.0}) == TrialScheduler.STOP
    row = ledger.board.rows["a"]
    assert (row.state, row.stopped_by, row.step) == ("STOPPED", control.person(), 4)
    assert row.reason == f"by {control.person()} at step 4"
    again = Rungs(ledger, "search", 16, Asha(grace_steps=2, reduction_factor=2))
    assert rungs.rungs == again.rungs
    assert rungs.rungs[4] == {"a": 4.0}
    ledger.close()


def test_without_a_driver_the_journal_says_it_at_once(results: Path) -> None:
    assert "at once" in control.stop(results, "a")
    row = Board.load(results).rows["a"]
    assert (row.state, row.step, row.stopped_by) == ("STOPPED", 2, control.person())
    assert not control.request_path(results, "a").exists()


@pytest.mark.parametrize(
    ("trial", "message"), [("x", "has no trial 'x'"), ("d", "has ended: stopped"), ("c", "loss became nan")]
)
def test_what_has_ended_or_never_was_is_not_stopped(results: Path, trial: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        control.stop(results, trial)


def test_a_failed_trial_is_open_again_where_it_was_sound(results: Path) -> None:
    control.retry(results, ["c"])
    board = Board.load(results)
    row = board.rows["c"]
    assert (row.state, row.reason, row.fids) == ("PENDING", None, {2: 6.0})
    assert board.last is not None
    assert (board.last.kind, board.last.reason) == ("reopened", "was failed: loss became nan")
    assert board.last.by == control.person()


def test_a_retry_makes_a_finished_sweep_unfinished_and_takes_back_a_persons_stop(results: Path) -> None:
    control.stop(results, "a")
    control.stop(results, "b")
    ledger = Ledger(results)
    ledger.add(event("finished"))
    ledger.close()
    assert control.driver(results).state == "none"
    control.retry(results, ["a", "c"])
    board = Board.load(results)
    assert not board.finished
    assert [name for name, row in board.rows.items() if row.open] == ["a", "c"]
    assert control.driver(results).state == "gone"


@pytest.mark.parametrize(("trial", "why"), [("d", "scheduler stopped it by its FID"), ("e", "it is completed")])
def test_only_what_failed_or_was_stopped_by_a_person_is_tried_again(results: Path, trial: str, why: str) -> None:
    before = (results / "journal.jsonl").read_bytes()
    with pytest.raises(UsageError, match=why):
        control.retry(results, ["c", trial])
    assert (results / "journal.jsonl").read_bytes() == before, "all or none"


def test_a_driver_elsewhere_is_seen_by_its_heartbeat(results: Path) -> None:
    assert control.driver(results).state == "gone"
    control.beat(results)
    assert control.driver(results).state == "running"
    assert "asked for" in control.stop(results, "a")
    os.utime(results / "lock", (time.time() - 2 * control.SILENT_S,) * 2)
    assert control.driver(results).state == "gone"


def test_a_folder_that_cannot_be_written_is_said_so(results: Path) -> None:
    control.beat(results)  # a driver elsewhere
    (results / "requests").touch()
    with pytest.raises(UsageError, match="cannot write in"):
        control.stop(results, "a")


def test_a_lock_that_is_no_text_is_read_all_the_same(results: Path) -> None:
    (results / "lock").write_bytes(b"process 1 on \xff\xfe\n")
    os.utime(results / "lock", (0, 0))
    assert control.driver(results).state == "gone"
    with folder.locked(results):
        (results / "lock").write_bytes(b"\xff")
        with pytest.raises(folder.Busy), folder.locked(results):
            pass
    with claims.claimed(results / "trials" / "a", print):
        (results / "trials" / "a" / "lock").write_bytes(b"\xff")

        def is_held(holder: str) -> None:
            raise UsageError(f"held by {holder}")

        with (
            mock.patch.object(claims, "ORPHAN_S", 0.0),
            pytest.raises(UsageError, match="held by \ufffd"),
            claims.claimed(results / "trials" / "a", is_held),
        ):
            pass


def test_an_id_that_another_process_has_by_now_is_no_driver(results: Path) -> None:
    (results / "lock").write_text(f"process {os.getpid()} on {platform.node()}\n")
    assert control.driver(results).state == "gone"
    with folder.locked(results):
        assert control.driver(results).state == "running"


def test_a_trial_that_is_open_again_is_handed_out_and_its_study_hears_of_it(
    tmp_path: Path, sweep_of: Callable[..., Sweep]
) -> None:
    sweep = sweep_of()
    (tmp_path / "sweep.json").write_text("{}")
    ledger = Ledger(tmp_path)
    search = Suggested(sweep, ledger, lambda row: {"trial_id": row.trial_id})
    asked = [search.suggest(str(number)) for number in range(2)]
    first, second = (config["trial_id"] for config in asked if isinstance(config, dict))
    ledger.add(event("failed", stage="search", trial_id=first, reason="OSError: disk full"))
    ledger.add(event("completed", stage="search", trial_id=second, step=8, fid=2.0))
    for number in range(2):
        search.on_trial_complete(str(number))
    assert [trial.state for trial in search.study.trials] == [TrialState.FAIL, TrialState.COMPLETE]
    ledger.close()

    control.retry(tmp_path, [first])
    ledger = Ledger(tmp_path)
    search = Suggested(sweep, ledger, lambda row: {"trial_id": row.trial_id})
    assert search.suggest("again") == {"trial_id": first}
    assert [trial.state for trial in search.study.trials] == [TrialState.RUNNING, TrialState.COMPLETE]
    ledger.add(event("completed", stage="search", trial_id=first, step=8, fid=1.0))
    search.on_trial_complete("again")
    assert [trial.value for trial in search.study.trials] == [1.0, 2.0]
    ledger.close()
