"""kill -9 of a driver, again and again: what comes out is what an undisturbed sweep says."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from driven import check_records, kill_all, left_after, name_of, no_step_back, processes, study_is_true

from raysparse import config
from raysparse.space import Sweep
from raysparse.sweep.board import Board, Ledger
from raysparse.sweep.journal import event, read
from raysparse.sweep.search import Suggested

KILLS = (signal.SIGKILL,) * 5
AGENTS = ("ray::RuntimeEnv", "ray::DashboardA")
SEARCH: dict[str, Any] = {
    "trials": 5,
    "axes": {
        "dense": {},
        "static": {"sparsity": [0.5, 0.75, 0.9]},
        "rigl": {"sparsity": [0.5, 0.9], "prune_ratio": {"low": 0.05, "high": 0.5}, "update_interval": [2, 3]},
    },
}


@pytest.fixture
def home(ray_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Ray's home; what a killed driver has left there ends with the test."""
    monkeypatch.setenv("RAYSPARSE_TEST", str(ray_home))
    yield ray_home
    kill_all(ray_home)


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "raysparse.cli", *map(str, words)]


def done(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=240, check=True)


def lines_of(out: Path) -> int:
    path = out / "journal.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def go_through(file: Path, out: Path, seed: int, home: Path, blows: Sequence[int]) -> None:
    """The sweep by its commands, its driver struck by these signals at random moments, then to its end."""
    draw = random.Random(seed)
    for number, blow in enumerate(blows):
        go_on = ["resume", out] if (out / "sweep.json").is_file() else ["sweep", file, "--output", out]
        said = out.with_name(f"said-{number}.txt")  # no pipe: what a killed driver leaves would hold it open
        with said.open("w") as stderr, subprocess.Popen(command(*go_on), stderr=stderr) as driver:
            # 2 to 6 events, of about 50, and up to half a second: in a step, an evaluation, a write, a trial's start.
            goal = lines_of(out) + draw.randint(2, 6)
            deadline = time.monotonic() + 90
            while lines_of(out) < goal and time.monotonic() < deadline:
                assert driver.poll() is None, said.read_text()
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.5))
            driver.send_signal(blow)  # to the driver alone: Ray's processes and the trial's have to find out
            driver.wait(timeout=90)
        _check_trials(out)
        if blow == signal.SIGKILL:
            assert driver.returncode == -signal.SIGKILL
        else:
            assert driver.returncode == 130
            assert "note: interrupted: the trials that run save themselves" in said.read_text()
            assert said.read_text().endswith(f"interrupted; go on with: raysparse resume {out}\n")
            assert list(read(out / "journal.jsonl"))[-1].kind == "interrupted"
            assert not left_after(10, home)
        if number == 0:
            _ended(home)
    last = done("resume", out)
    assert last.stdout.strip() == str(out / "report" / "report.html")
    assert "Traceback" not in last.stderr


def _ended(home: Path) -> None:
    """Nothing of a killed sweep trains on: its Ray ends by itself, and its trial with it.

    Ray's two idle agents per node first try to tell the dead head for a minute, and are not waited for.
    """
    deadline = time.monotonic() + 60
    while left := [name for each in processes(home) if (name := name_of(each)) and not name.startswith(AGENTS)]:
        assert time.monotonic() < deadline, f"left after a minute: {left}"
        time.sleep(0.2)


def _check_trials(out: Path) -> None:
    """Each start of a trial goes on from the last step that was reported: less than one interval is done twice."""
    for log in (out / "trials").glob("*/log.txt"):
        said = 0
        for begun in log.read_text().split(" begins, rank 0")[1:]:
            start = re.search(r"goes on from step (\d+)", begun)
            if not start and " step " not in begun:
                continue  # killed again before it had read its checkpoint
            assert (int(start[1]) if start else 0) >= said, f"{log}: back to {start and start[1]} after {said}"
            said = max([said, *(int(step) for step in re.findall(r" step (\d+): loss", begun))])


def history(out: Path) -> list[tuple[Any, ...]]:
    """All that was decided, in order: without times, places, and starts, of which a killed sweep has more."""
    kinds = ("planned", "repeated", "report", "stopped", "completed", "failed", "chosen", "stage", "finished")
    return [
        (
            *(item.kind, item.stage, item.trial_id, item.step, item.fid, item.intermediate_fid),
            *(item.reason, item.number, item.seed),
        )
        for item in read(out / "journal.jsonl")
        if item.kind in kinds
    ]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_five_moments_one_trial_at_a_time_equals_the_undisturbed_sweep(
    tmp_path: Path, sweep_of: Callable[..., Sweep], home: Path
) -> None:
    """TPE, ASHA and the confirm stage in one: with a fixed order of reports each decision is the same."""
    sweep = sweep_of(search=SEARCH | {"sampler": "tpe"}, resources={"max_concurrent": 1})
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(sweep.model_dump(mode="json"), sort_keys=False))
    alone, out = tmp_path / "alone", tmp_path / "out"
    done("sweep", file, "--output", alone)
    go_through(file, out, 1, home, KILLS)

    assert history(out) == history(alone)
    board = Board.load(out)
    assert [row.fids for row in board.rows.values()] == [row.fids for row in Board.load(alone).rows.values()]
    assert "STOPPED" in board.counts()
    assert board.of_stage("confirm")
    study_is_true(out, board)
    check_records(out, board)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_interrupted_and_killed_two_trials_at_a_time_nothing_is_lost_or_doubled(
    tmp_path: Path, sweep_of: Callable[..., Sweep], home: Path
) -> None:
    """ASHA decides in the order of reports, which differs; the trials of a random search do not.

    With an intermediate FID, so that a kill falls between values of two protocols as well.
    """
    base = config.with_value(sweep_of().base, "evaluate.intermediate", {"generated": 8, "ddim_steps": 1})
    sweep = sweep_of(base=base, search=SEARCH | {"sampler": "random", "trials": 8}, resources={"max_concurrent": 2})
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(sweep.model_dump(mode="json"), sort_keys=False))
    out = tmp_path / "out"
    go_through(file, out, 2, home, (signal.SIGINT, *KILLS[:2]))

    board = Board.load(out)
    no_step_back(list(read(out / "journal.jsonl")))
    assert {row.state for row in board.of_stage("confirm")} == {"COMPLETED"}
    assert "dense" in {row.method for row in board.of_stage("confirm")}
    assert [row.trial_id for row in board.of_stage("search")] == undisturbed(sweep, tmp_path)
    assert not {"RUNNING", "PENDING"} & set(board.counts())
    study_is_true(out, board)
    check_records(out, board)


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
