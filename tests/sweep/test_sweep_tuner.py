"""Whole sweeps on a Ray of their own: to the end, past failures, through Ctrl-C and kill -9."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from driven import check_records, driver, no_step_back, processes, study_is_true, wait_for

from raysparse import space
from raysparse.errors import UsageError
from raysparse.space import Sweep
from raysparse.sweep import tuner
from raysparse.sweep.board import Board, Ledger
from raysparse.sweep.journal import Event, event, read
from raysparse.sweep.search import Suggested


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
    no_step_back(events)
    check_records(tmp_path / "out", summary.board)
    assert [item.kind for item in events] == [item.kind for item in read(tmp_path / "out" / "journal.jsonl")]
    assert events[-1].kind == "finished"
    assert list((tmp_path / "out" / "tune").glob("*/events.out.tfevents.*"))
    with pytest.raises(UsageError, match="is finished"):
        tuner.run(sweep, tmp_path / "out", command="")
    assert tuner.resume(tmp_path / "out").board.counts() == summary.board.counts()  # starts nothing
    with pytest.raises(UsageError, match="belongs to another sweep"):
        tuner.run(sweep_of(), tmp_path / "out", command="")


@pytest.mark.ray
def test_a_search_interrupted_and_killed_ends_as_ifundisturbed(
    tmp_path: Path, sweep_of: Callable[..., Sweep], ray_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, out = sweep_of(), tmp_path / "out"
    monkeypatch.setenv("RAYSPARSE_TEST", str(ray_home))

    with driver("run", out, ray_home, sweep) as process:  # Ctrl-C in a terminal reaches the whole group
        wait_for(out, process, reports=2)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130
    assert not processes(ray_home)
    events = list(read(out / "journal.jsonl"))
    assert events[-1].kind == "interrupted"
    before = Board.load(out)

    with driver("resume", out, ray_home, sweep) as process:
        wait_for(out, process, reports=sum(len(row.fids) for row in before.rows.values()) + 3)
        process.kill()
    assert not Board.load(out).finished
    left = processes(ray_home)  # the killed sweep's; the resumed one has to live with them

    summary = tuner.resume(out, num_cpus=2, temp_dir=ray_home)
    for process in set(left) & set(processes(ray_home)):
        os.kill(process, signal.SIGKILL)
    assert not summary.interrupted
    board = summary.board
    no_step_back(list(read(out / "journal.jsonl")))
    check_records(out, board)
    assert [row.trial_id for row in board.of_stage("search")] == undisturbed(sweep, tmp_path)
    assert {row.state for row in board.of_stage("confirm")} == {"COMPLETED"}
    assert {row.method for row in board.of_stage("confirm")} >= {"dense"}
    study_is_true(out, board)


@pytest.mark.timeout(60)  # the promise: said within a minute, instead of waiting for ever
def test_more_workers_than_cores_are_refused_at_once(
    tmp_path: Path, sweep_of: Callable[..., Sweep], ray_home: Path
) -> None:
    sweep = sweep_of(resources={"workers": 8})
    with pytest.raises(UsageError, match="needs 8 workers x 1 CPUs, but this machine has 2 CPUs"):
        tuner.run(sweep, tmp_path / "out", command="", num_cpus=2, temp_dir=ray_home)
    assert not (tmp_path / "out" / "sweep.json").exists()


def undisturbed(sweep: Sweep, folder: Path) -> list[str]:
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
