"""Sweeps that another process drives, and what must hold of a folder whatever was done to it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from raysparse import results as records
from raysparse.space import Sweep
from raysparse.sweep import trial_log
from raysparse.sweep.board import Board
from raysparse.sweep.journal import Event, read

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
            compared = "intermediate_fid" if row.intermediate else "fid"
            assert [item[compared] for item in rows] == [row.fids[step] for step in sorted(row.fids)]
            assert all(item["samples_png"] for item in rows if item[compared] is not None)
        assert rows[-1]["fid"] == row.fid
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


def left_after(seconds: float, home: Path) -> dict[int, str]:
    """Those of them that such a time does not end: process -> name. Ray has killed its own, a busy core buries late."""
    deadline = time.monotonic() + seconds
    while (left := {process: name_of(process) for process in processes(home)}) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def kill_all(home: Path) -> None:
    """What a killed driver has left."""
    for process in processes(home):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(process, signal.SIGKILL)


def name_of(process: int) -> str:
    """Empty where it has ended."""
    try:
        return Path(f"/proc/{process}/comm").read_text().strip()
    except OSError:
        return ""


def process_of(out: Path, trial_id: str, rank: int) -> int:
    """Of a trial's rank, as its log has it."""
    log = trial_log.path_of(out / "trials" / trial_id, rank).read_text()
    return int(re.findall(rf" process (\d+) on .* begins, rank {rank}", log)[-1])


def driver(kind: str, out: Path, home: Path, sweep: Sweep) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, kind, str(out), str(home), sweep.model_dump_json()], start_new_session=True
    )


def wait_for(out: Path, driver: subprocess.Popen[bytes], reports: int) -> None:
    """Until the journal has so many reports."""
    deadline = time.monotonic() + 120
    while sum(item.fid is not None for item in read(out / "journal.jsonl")) < reports:
        assert driver.poll() is None, "the driver ended before its time"
        assert time.monotonic() < deadline, "no reports"
        time.sleep(0.02)


def no_step_back(events: list[Event]) -> None:
    seen: dict[str, int] = {}
    for item in events:
        if item.trial_id and item.step and item.kind in ("report", "stopped", "completed"):
            assert item.step > seen.get(item.trial_id, 0), f"{item.trial_id} went back to {item.step}"
            seen[item.trial_id] = item.step


def study_is_true(out: Path, board: Board) -> None:
    storage = JournalStorage(JournalFileBackend(str(out / "optuna" / "study.log")))
    trials = optuna.load_study(study_name="tiny", storage=storage).get_trials()
    expected = {"COMPLETED": TrialState.COMPLETE, "STOPPED": TrialState.PRUNED, "FAILED": TrialState.FAIL}
    assert len(trials) >= len(board.of_stage("search"))
    for trial in trials:
        row = board.rows[trial.user_attrs["trial_id"]]
        assert trial.state == expected[row.state]
        assert trial.intermediate_values == row.fids
        assert row.state != "COMPLETED" or trial.value == row.fid


def files(checkpoint: Path | None) -> dict[str, bytes]:
    """The bytes of weights, averages, masks and moments."""
    assert checkpoint is not None
    return {path.name: path.read_bytes() for path in checkpoint.glob("*.safetensors")}
