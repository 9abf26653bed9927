"""Whole sweeps on a Ray of their own: to the end, past failures, through Ctrl-C and kill -9."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from driven import check_records, no_step_back
from ray.tune.execution import class_cache

from raysparse import config, results, space
from raysparse.errors import UsageError
from raysparse.space import Sweep
from raysparse.sweep import changes, cluster, folder, patience, preparing, tuner
from raysparse.sweep.board import Board, Ledger
from raysparse.sweep.journal import Event, event, read
from raysparse.sweep.limits import Guard, Limits
from raysparse.sweep.search import planned


@pytest.mark.ray
def test_a_disk_that_stays_full_ends_a_sweep_in_words_and_resume_goes_on(
    tmp_path: Path, sweep_of: Callable[..., Sweep], ray_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    sweep = sweep_of(search=None, grid={"dense": {}}, asha=None, confirm=None)
    with monkeypatch.context() as disk:
        disk.setattr(patience, "DELAYS_S", ())
        disk.setattr(results, "write_trial", full)
        with pytest.raises(UsageError, match=r"No space left .* raysparse resume"):
            tuner.run(sweep, tmp_path / "out", command="", num_cpus=1, temp_dir=ray_home)
    summary = tuner.resume(tmp_path / "out", num_cpus=1, temp_dir=ray_home)
    assert summary.board.counts() == {"COMPLETED": 1}


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
def test_a_process_lost_between_two_trials_costs_no_trial(
    tmp_path: Path, sweep_of: Callable[..., Sweep], ray_home: Path
) -> None:
    sweep = sweep_of(search=None, grid={"static": {"sparsity": [0.5, 0.75]}}, asha=None, confirm=None)
    lost: list[int] = []
    environments: list[bytes] = []

    def on_event(item: Event) -> None:
        if item.kind == "completed" and not lost:  # the next trial is about to be handed to it
            lost.append(int((tmp_path / "out" / "trials" / str(item.trial_id) / "lock").read_text().split()[0]))
            environments.append(Path(f"/proc/{lost[0]}/environ").read_bytes())
            os.kill(lost[0], signal.SIGKILL)

    summary = tuner.run(sweep, tmp_path / "out", command="", on_event=on_event, num_cpus=1, temp_dir=ray_home)
    assert lost
    assert b"\0TUNE_FUNCTION_THREAD_TIMEOUT_S=86400\0" in environments[0]  # or a slow end costs the next trial too
    assert cluster.HANDOVER in class_cache.ENV_VARS_TO_PROPAGATE
    assert summary.board.finished
    assert summary.board.counts() == {"COMPLETED": 3}
    check_records(tmp_path / "out", summary.board)


@pytest.mark.timeout(60)  # the promise: said within a minute, instead of waiting for ever
def test_more_workers_than_cores_are_refused_at_once(
    tmp_path: Path, sweep_of: Callable[..., Sweep], ray_home: Path
) -> None:
    sweep = sweep_of(resources={"workers": 8})
    with pytest.raises(UsageError, match="needs 8 workers x 1 CPUs, but this machine has 2 CPUs"):
        tuner.run(sweep, tmp_path / "out", command="", num_cpus=2, temp_dir=ray_home)
    assert not (tmp_path / "out" / "sweep.json").exists()


@pytest.mark.parametrize(
    ("workers", "compiled", "axis", "reused"),
    [
        *[(1, False, {}, True), (2, False, {}, False)],
        *[(1, True, {}, False), (1, False, {"train.compile": [True, False]}, False)],
    ],
)
def test_a_process_is_used_again_where_no_trial_is_compiled(
    workers: int,
    compiled: bool,
    axis: dict[str, Any],
    reused: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sweep_of: Callable[..., Sweep],
) -> None:
    monkeypatch.setattr("ray.tune.Tuner", lambda _, tune_config, run_config: tune_config)
    base = config.with_value(sweep_of().base, "train.compile", compiled)
    sweep = sweep_of(
        base=base, search=None, grid={"static": axis}, asha=None, confirm=None, resources={"workers": workers}
    )
    assert tuner._tuner(sweep, tmp_path, None, None, [], 1).reuse_actors is reused


def test_a_search_that_is_over_does_not_begin_again(tmp_path: Path, sweep_of: Callable[..., Sweep]) -> None:
    sweep = sweep_of()
    trial = space.trial(sweep, {"method": "static", "sparsity": 0.5})
    ledger = Ledger(tmp_path)

    def stages() -> list[str | None]:
        """Those that a driver says begin, who finds the sweep as it is."""
        before = len(list(read(tmp_path / "journal.jsonl")))
        for stage in ("search", "confirm"):
            tuner._plan(stage, sweep, ledger)
        return [item.stage for item in list(read(tmp_path / "journal.jsonl"))[before:] if item.kind == "stage"]

    ledger.add(planned(trial, {"method": "static", "sparsity": 0.5}, "search", 0))
    assert stages() == ["search", "confirm"]
    assert stages() == ["search", "confirm"], "a trial of the search is open"
    ledger.add(event("completed", stage="search", trial_id=trial.trial_id, step=8, fid=1.0))
    assert stages() == []
    ledger.add(event("accepted", stage="confirm", reason="another version"))
    assert stages() == []
    ledger.add(event("accepted", reason="more trials"))
    assert stages() == ["search", "confirm"]
    ledger.close()


def test_a_search_that_is_over_is_not_asked_again(
    tmp_path: Path, sweep_of: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended with one trial of six, all points tried; the sweep was killed in its confirm stage."""
    sweep, out = preparing.with_whole_paths(sweep_of()), tmp_path / "out"
    folder.create(out, sweep, "")
    guard = Guard(Limits(), sweep.resources, out, Board())

    class Searched(Exception):
        pass

    def searcher(*_: Any) -> None:
        raise Searched

    monkeypatch.setattr(tuner, "_searcher", searcher)
    ledger = Ledger(out)
    point = {"method": "static", "sparsity": 0.5}
    ledger.add(event("stage", stage="search"))
    ledger.add(planned(space.trial(sweep, point), point, "search", 0))
    ledger.add(event("failed", stage="search", trial_id=next(iter(ledger.board.rows)), reason="lost"))
    ledger.add(event("stage", stage="confirm"))
    tuner._stage("search", sweep, out, "", ledger, 1, lambda: False, guard)
    ledger.add(event("accepted", reason="search.trials 6 then, 7 now"))
    with pytest.raises(Searched):
        tuner._stage("search", sweep, out, "", ledger, 1, lambda: False, guard)
    ledger.close()


def test_other_versions_alone_do_not_begin_the_search_again(
    tmp_path: Path, sweep_of: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, out = preparing.with_whole_paths(sweep_of()), tmp_path / "out"
    more = sweep_of(search=sweep.model_dump(mode="json")["search"] | {"trials": 7})
    folder.create(out, sweep, "")
    monkeypatch.setattr(preparing, "prepare", lambda *_, **__: None)
    monkeypatch.setattr(tuner, "_drive", lambda *_, **__: None)
    monkeypatch.setattr(changes, "differences", lambda *_: ["torch 2.14 then, 2.15 now"])
    stages = []
    for file in (None, sweep, more):
        ledger = Ledger(out)
        ledger.add(event("stage", stage="confirm"))
        ledger.close()
        tuner.resume(out, space_file=file, accept_changes=True)
        stages.append(Board.load(out).stage)
    assert stages == ["confirm", "confirm", None]
