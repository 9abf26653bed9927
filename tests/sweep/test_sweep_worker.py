"""Trials of two DDP workers, through Ray Train inside Tune."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from raysparse import results as records
from raysparse import space
from raysparse.space import Sweep
from raysparse.sweep import tuner
from raysparse.sweep.journal import Event, read
from raysparse.sweep.worker import _raised


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_train_a_trial_past_the_loss_of_one_and_an_error_is_not_tried_again(
    tmp_path: Path, sweep_of: Callable[..., Sweep], ray_home: Path
) -> None:
    sweep = sweep_of(search=None, grid={"rigl": {"sparsity": [0.5], "update_interval": [2]}}, confirm=None)
    sweep = sweep.model_copy(update={"resources": sweep.resources.model_copy(update={"workers": 2})})
    out = tmp_path / "out"
    rigl = space.trial(sweep, space.grid_points(sweep)[1]).trial_id

    killed = []

    def on_event(item: Event) -> None:
        if item.kind == "report" and item.trial_id != rigl and not killed:  # rank 0 of the first trial is lost once
            killed.append(int((out / "trials" / str(item.trial_id) / "lock").read_text().split()[0]))
            os.kill(killed[0], signal.SIGKILL)
        # The second trial's rank 0 finds a file where it wants a folder.
        if item.kind == "planned" and item.trial_id == rigl:
            (out / "trials" / rigl).mkdir(parents=True)
            (out / "trials" / rigl / "samples").touch()

    summary = tuner.run(sweep, out, command="", on_event=on_event, num_cpus=2, temp_dir=ray_home)
    assert killed
    steps = [item.step for item in read(out / "journal.jsonl") if item.fid is not None]
    assert steps == sorted(set(steps)), "no step twice and none back"
    dense, failed = summary.board.rows.values()
    assert (dense.state, dense.step) == ("COMPLETED", 8), dense.reason
    rows = records.read_trial(out / "records" / f"{dense.trial_id}.parquet").to_pylist()
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert {row["world_size"] for row in rows} == {2}
    assert (failed.state, failed.step) == ("FAILED", 0)
    assert str(failed.reason).startswith(("FileExistsError", "NotADirectoryError"))


def test_what_a_worker_raises_is_told_from_a_worker_that_is_lost() -> None:
    from ray.exceptions import ActorDiedError
    from ray.train.v2.api.exceptions import WorkerGroupError

    mistake = ValueError("no such class")
    assert _raised(WorkerGroupError("", {1: mistake})) is mistake
    assert _raised(WorkerGroupError("", {0: ActorDiedError()})) is None
    broken = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:3")
    assert _raised(WorkerGroupError("", {0: broken})) is None
    assert _raised(WorkerGroupError("", {0: broken, 1: ActorDiedError()})) is None
