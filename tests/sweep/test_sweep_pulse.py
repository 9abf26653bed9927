"""A rank that hangs is told with its stacks and ended; one that is slow is let be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hanging import LIMIT_S

from raysparse import space
from raysparse.space import Sweep
from raysparse.sweep import _watcher, leaving, pulse
from raysparse.train import setup

SCRIPT = Path(__file__).with_name("hanging.py")
POINT = {"method": "rigl", "sparsity": 0.5, "prune_ratio": 0.5, "update_interval": 2}


@pytest.fixture
def trial(tmp_path: Path, sweep_of: Callable[..., Sweep], ray_home: Path) -> Path:
    """A trial's folder, with its settings in it and its data prepared."""
    config = space.trial(sweep_of(), POINT)
    setup.prepare_data(config)
    folder = tmp_path / "trials" / config.trial_id
    folder.mkdir(parents=True)
    (folder / "trial.json").write_text(config.dump_json())
    return folder


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(trial: Path) -> Iterator[Start]:
    """start(rank, ranks, how) -> the rank's process."""
    started: list[subprocess.Popen[str]] = []

    def begin(rank: int, ranks: int, how: str) -> subprocess.Popen[str]:
        words = [sys.executable, SCRIPT, trial.parents[1], trial.name, str(rank), str(ranks), how]
        started.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_deadlock_is_told_with_the_stacks_and_ended(trial: Path, start: Start) -> None:
    process = start(0, 1, "lock")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == -9
    assert [json.loads(line)[0] for line in said.splitlines()] == [2]
    reason = pulse.hung(trial)
    assert reason is not None
    assert reason.startswith("it hung: rank 0 asleep at step 3 for ")
    assert "in <lambda> at hanging.py:" in reason
    assert reason.endswith(f"the stacks of all threads are in {trial}: log.txt")
    log = (trial / "log.txt").read_text()
    assert "rank 0 hangs: asleep at step 3" in log
    assert " in _train_to\n" in log
    assert "(most recent call first)" in log

    for _ in range(leaving.STARTS_LIMIT):
        assert leaving.count_start(trial, 2, reason) is None
    assert str(leaving.count_start(trial, 2, reason)).startswith(
        "its process ended 3 times at or after step 2 without getting further; the last time it hung: rank 0"
    )
    (trial / leaving.STARTS).unlink(missing_ok=True)
    again = start(0, 1, "sound")
    said, _ = again.communicate(timeout=60)
    assert again.returncode == 0
    assert [json.loads(line) for line in said.splitlines()] == [[step, None] for step in (2, 4, 6, 8)]
    assert pulse.hung(trial) is None
    assert not list(trial.glob("hang-*"))


@pytest.mark.slow
@pytest.mark.parametrize(("how", "state"), [("stopped", "stopped"), ("C call", "asleep")])
def test_no_thread_of_the_rank_needs_to_run(trial: Path, start: Start, how: str, state: str) -> None:
    process = start(0, 1, how)
    process.communicate(timeout=60)
    assert process.returncode == -9
    assert f"rank 0 {state} at step 3" in str(pulse.hung(trial))
    # A stopped process goes on for some milliseconds while one of its threads writes.
    assert (" in train_rank\n" if how == "stopped" else " in <lambda>\n") in (trial / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "state", "step"),
    [
        ("sleep", "asleep", 3),
        ("stopped", "stopped", 3),
        ("stopped in a report", "stopped", 2),  # where one may wait half an hour for what others do
    ],
)
def test_of_two_ranks_both_stacks_are_told(trial: Path, start: Start, how: str, state: str, step: int) -> None:
    ranks = [start(0, 2, "sound"), start(1, 2, how)]
    for process in ranks:
        process.communicate(timeout=90)
    assert [process.returncode for process in ranks] == [-9, -9]
    reason = str(pulse.hung(trial))
    # At step 3 in backward's reduction, which has no Python frame of its own.
    assert f"rank 0 asleep at step {step} for " in reason
    assert f"rank 1 {state} at step {step} for " in reason
    assert how != "sleep" or "in <lambda> at hanging.py:" in reason
    for name in ("log.txt", "log-1.txt"):
        assert "in train_rank\n" in (trial / name).read_text()


@pytest.mark.slow
def test_what_is_slow_is_no_hang(trial: Path, start: Start) -> None:
    """A first step that compiles, steps that sleep, full storage, a long evaluation, a driver that is busy."""
    process = start(0, 1, "slow")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert [json.loads(line) for line in said.splitlines()] == [[step, None] for step in (2, 4, 6, 8)]
    assert pulse.hung(trial) is None


LIMIT, LONG = 40.0, _watcher.LONG_S


@pytest.mark.parametrize(
    ("lines", "threads", "cores", "after_s"),
    [
        (["begin 0"], "S", 0.0, LIMIT),
        (["begin 0"], "S", 0.9, LONG),  # compiles, or loads its kernels
        (["begin 0"], "R", 0.0, LONG),  # would run, but gets no core
        (["begin 0", "step 1", "step 2"], "S", 0.0, LIMIT),
        (["begin 0", "step 1", "step 2"], "S", 0.9, LONG),  # not enough known of its steps
        (["begin 0", *(f"step {k}" for k in range(20))], "S", 0.9, LIMIT),  # an endless loop, or NCCL's spinning
        (["begin 0", "step 1", "evaluation 1"], "S", 0.9, LONG),
        (["begin 0", "step 1", "evaluation 1"], "S", 0.0, LIMIT),
        (["wait for the checkpoint of step 4"], "S", 0.0, LONG),
        (["begin 0", "step 1"], "D", 0.0, LONG),  # a network mount that is away
        (["begin 0", "step 1"], "t", 0.0, None),  # a debugger's
        (["idle for the sweep's driver"], "S", 0.0, None),
        (["idle for the sweep's driver"], "T", 0.0, LIMIT),
        (["wait for the checkpoint of step 4"], "T", 0.0, LIMIT),
        (["begin 0", "step 1", "step 20"], "S", 0.9, LIMIT),  # a rank tells of one step in many
    ],
)
def test_how_long_a_rank_may_stand_still(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lines: list[str], threads: str, cores: float, after_s: float | None
) -> None:
    watch, used = observed(monkeypatch, tmp_path, threads)
    for line in lines:
        watch.heard(line)
    for second in range(1, int(LONG) + 60):
        used[0] += cores
        watch.look(1.0)
        if watch.hangs:
            assert second == after_s
            return
    assert after_s is None


@pytest.mark.parametrize(("cores", "after_s"), [(0.0, 100), (0.9, 1000)])
def test_a_rank_whose_steps_take_long_has_longer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cores: float, after_s: int
) -> None:
    watch, used = observed(monkeypatch, tmp_path, "S")
    watch.heard("begin 0")
    for step in range(15):
        for _ in range(20):
            watch.look(1.0)
        watch.heard(f"step {step}")
    for second in range(1, after_s + 1):
        used[0] += cores
        watch.look(1.0)
        assert watch.hangs == (second == after_s)


def test_what_a_process_has_started_counts_as_its_work() -> None:
    """A compiler works in processes of its own while the rank sleeps."""
    before = _watcher.cpu_seconds(os.getpid())
    grandchild = "import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', 'while True: pass'])"
    child = subprocess.Popen([sys.executable, "-S", "-c", grandchild], start_new_session=True)
    deadline = time.monotonic() + 60
    try:
        while _watcher.cpu_seconds(os.getpid()) < before + 0.5:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def observed(monkeypatch: pytest.MonkeyPatch, folder: Path, threads: str) -> tuple[Any, list[float]]:
    """A watch of a process whose threads are in this state, and the seconds of CPU that it has used."""
    used = [0.0]
    monkeypatch.setattr(_watcher, "thread_states", lambda process: {threads, "S"})
    monkeypatch.setattr(_watcher, "cpu_seconds", lambda process: used[0])
    monkeypatch.setattr(_watcher, "CHILDREN", True)
    return _watcher.Watch(1, folder, 0, LIMIT, compiles=False), used


def test_the_limit_is_a_setting_that_changes_no_result(sweep_of: Callable[..., Sweep]) -> None:
    assert sweep_of(resources={"hung_after_s": LIMIT_S}).digest == sweep_of().digest
