"""Whole sweeps on a Ray of their own: to the end, past failures, through Ctrl-C and kill -9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from raysparse import results as records
from raysparse import space
from raysparse.errors import UsageError
from raysparse.space import Sweep
from raysparse.sweep import tuner
from raysparse.sweep.board import Board, Ledger
from raysparse.sweep.journal import Event, event, read
from raysparse.sweep.search import Suggested

DRIVER = """
import json, sys
from pathlib import Path
from raysparse import space
from raysparse.sweep import tuner
kind, results, home, content = sys.argv[1:]
ray = {"num_cpus": 2, "temp_dir": Path(home)}
if kind == "run":
    summary = tuner.run(space.parse(json.loads(content), "test"), Path(results), command="test", **ray)
else:
    summary = tuner.resume(Path(results), **ray)
sys.exit(130 if summary.interrupted else 0)
"""


def rows_of(results: Path) -> dict[str, list[dict[str, Any]]]:
    """trial id -> its record's rows."""
    return {path.stem: records.read_trial(path).to_pylist() for path in records.record_paths(results)}


def check_records(results: Path, board: Board) -> None:
    """The records say what the board says: each trial once, each step once, in order."""
    found = rows_of(results)
    assert set(found) == set(board.rows)
    for trial_id, rows in found.items():
        row = board.rows[trial_id]
        assert {item["state"] for item in rows} == {row.state}
        assert {item["stage"] for item in rows} == {row.stage}
        if row.fids:
            assert [item["step"] for item in rows] == sorted(row.fids)
            assert [item["fid"] for item in rows] == [row.fids[step] for step in sorted(row.fids)]
        assert all(item["samples_png"] for item in rows if item["fid"] is not None)
        assert {item["stopped_at_step"] for item in rows} == {row.step if row.state == "STOPPED" else None}


def processes(home: Path) -> list[int]:
    """Processes that a driver of this test has started, itself included."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if f"RAYSPARSE_TEST={home}".encode() in environment and state != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.ray
def test_a_grid_goes_past_failing_and_diverging_trials(
    tmp_path: Path, sweep_of: Callable[..., Sweep], ray_home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    axes = {"static": {"sparsity": [0.5, 0.75], "optimizer.lr": [1e-3, 1e30]}}
    sweep = sweep_of(search=None, grid=axes, asha=None, confirm=None)
    points = space.grid_points(sweep)
    assert points[0] == {"method": "dense"}, "the baseline is added"
    dense = tuner.space.trial(sweep, points[0]).trial_id
    raises = str(tuner.space.trial(sweep, points[3]).trial_id)
    (tmp_path / "out").mkdir()
    events: list[Event] = []
    lost: list[int] = []

    def on_event(item: Event) -> None:
        events.append(item)
        if item.kind == "report" and item.trial_id == dense and not lost:  # its process is lost, once
            lost.append(int((tmp_path / "out" / "trials" / dense / "lock").read_text().split()[0]))
            os.kill(lost[0], signal.SIGKILL)
        if item.kind == "planned" and item.trial_id == raises:  # a file where the trial wants a folder
            (tmp_path / "out" / "trials" / raises).mkdir(parents=True)
            (tmp_path / "out" / "trials" / raises / "samples").touch()

    summary = tuner.run(
        sweep, tmp_path / "out", command="raysparse sweep x.yaml", on_event=on_event, num_cpus=2, temp_dir=ray_home
    )
    assert capfd.readouterr() == ("", ""), "the terminal is the command line's"
    assert not summary.interrupted
    states = {row.trial_id: row.state for row in summary.board.rows.values()}
    assert states.pop(raises) == "FAILED"
    assert "Error: " in str(summary.board.rows[raises].reason)
    diverged = [row for row in summary.failed if row.trial_id != raises]
    assert {row.point["optimizer.lr"] for row in diverged} == {1e30}
    assert all("loss" in str(row.reason) for row in diverged)
    assert list(states.values()).count("COMPLETED") == 5 - len(diverged) - 1
    assert lost
    assert states[dense] == "COMPLETED"
    assert [item.kind for item in events if item.trial_id == dense].count("started") == 2
    _no_step_back(events)
    check_records(tmp_path / "out", summary.board)
    assert [item.kind for item in events] == [item.kind for item in read(tmp_path / "out" / "journal.jsonl")]
    assert events[-1].kind == "finished"
    assert list((tmp_path / "out" / "tune").glob("*/events.out.tfevents.*"))
    with pytest.raises(UsageError, match="is finished"):
        tuner.run(sweep, tmp_path / "out", command="")
    assert tuner.resume(tmp_path / "out").board.counts() == summary.board.counts()  # starts nothing
    with pytest.raises(UsageError, match="belongs to another sweep"):
        tuner.run(sweep_of(), tmp_path / "out", command="")


@pytest.mark.slow
@pytest.mark.ray
def test_a_search_interrupted_and_killed_ends_as_if_undisturbed(
    tmp_path: Path, sweep_of: Callable[..., Sweep], ray_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, out = sweep_of(), tmp_path / "out"
    monkeypatch.setenv("RAYSPARSE_TEST", str(ray_home))

    with _driver("run", out, ray_home, sweep) as driver:  # Ctrl-C in a terminal reaches the whole group
        _wait_for(out, driver, reports=2)
        os.killpg(driver.pid, signal.SIGINT)
        assert driver.wait(timeout=60) == 130
    assert not processes(ray_home)
    events = list(read(out / "journal.jsonl"))
    assert events[-1].kind == "interrupted"
    before = Board.load(out)

    with _driver("resume", out, ray_home, sweep) as driver:
        _wait_for(out, driver, reports=sum(len(row.fids) for row in before.rows.values()) + 3)
        driver.kill()
    assert not Board.load(out).finished
    left = processes(ray_home)  # the killed sweep's; the resumed one has to live with them

    summary = tuner.resume(out, num_cpus=2, temp_dir=ray_home)
    for process in set(left) & set(processes(ray_home)):
        os.kill(process, signal.SIGKILL)
    assert not summary.interrupted
    board = summary.board
    _no_step_back(list(read(out / "journal.jsonl")))
    check_records(out, board)
    assert [row.trial_id for row in board.of_stage("search")] == _undisturbed(sweep, tmp_path)
    assert {row.state for row in board.of_stage("confirm")} == {"COMPLETED"}
    assert {row.method for row in board.of_stage("confirm")} >= {"dense"}
    _study_is_true(out, board)


@pytest.mark.timeout(60)  # the promise: said within a minute, instead of waiting for ever
def test_more_workers_than_cores_are_refused_at_once(
    tmp_path: Path, sweep_of: Callable[..., Sweep], ray_home: Path
) -> None:
    sweep = sweep_of(resources={"workers": 8})
    with pytest.raises(UsageError, match="needs 8 workers x 1 CPUs, but this machine has 2 CPUs"):
        tuner.run(sweep, tmp_path / "out", command="", num_cpus=2, temp_dir=ray_home)
    assert not (tmp_path / "out" / "sweep.json").exists()


def _driver(kind: str, out: Path, home: Path, sweep: Sweep) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, kind, str(out), str(home), sweep.model_dump_json()], start_new_session=True
    )


def _wait_for(out: Path, driver: subprocess.Popen[bytes], reports: int) -> None:
    """Until the journal has so many reports."""
    deadline = time.monotonic() + 120
    while sum(item.fid is not None for item in read(out / "journal.jsonl")) < reports:
        assert driver.poll() is None, "the driver ended before its time"
        assert time.monotonic() < deadline, "no reports"
        time.sleep(0.02)


def _no_step_back(events: list[Event]) -> None:
    seen: dict[str, int] = {}
    for item in events:
        if item.trial_id and item.step and item.kind in ("report", "stopped", "completed"):
            assert item.step > seen.get(item.trial_id, 0), f"{item.trial_id} went back to {item.step}"
            seen[item.trial_id] = item.step


def _undisturbed(sweep: Sweep, folder: Path) -> list[str]:
    """The trials of a random search, whose draws depend on nothing but their number."""
    (folder / "alone").mkdir()
    ledger = Ledger(folder / "alone")
    search = Suggested(sweep, ledger, lambda row: {"trial_id": row.trial_id})
    asked = []
    while isinstance(config := search.suggest(str(len(asked))), dict):
        asked.append(config["trial_id"])
        ledger.add(event("completed", stage="search", trial_id=asked[-1], step=8, fid=1.0))
        search.on_trial_complete(str(len(asked) - 1))
    ledger.close()
    return asked


def _study_is_true(out: Path, board: Board) -> None:
    storage = JournalStorage(JournalFileBackend(str(out / "optuna" / "study.log")))
    trials = optuna.load_study(study_name="tiny", storage=storage).get_trials()
    expected = {"COMPLETED": TrialState.COMPLETE, "STOPPED": TrialState.PRUNED, "FAILED": TrialState.FAIL}
    assert len(trials) >= len(board.of_stage("search"))
    for trial in trials:
        row = board.rows[trial.user_attrs["trial_id"]]
        assert trial.state == expected[row.state]
        assert trial.intermediate_values == row.fids


def test_paths_are_made_whole_before_a_trials_process_sees_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sweep_of: Callable[..., Sweep]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYSPARSE_DATA", "prepared")
    sweep = sweep_of()
    near = sweep_of(base=sweep.base | {"data": sweep.base.get("data", {}) | {"source": "raw/file.npz"}})
    whole = tuner.with_whole_paths(near)
    assert whole.base["data"]["source"] == str(tmp_path / "raw/file.npz")
    assert whole.base["data"]["root"] == str(tmp_path / "prepared")
    assert whole.digest == near.digest == sweep.digest
