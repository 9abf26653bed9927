"""Trials of two DDP workers, through Ray Train inside Tune."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from driven import check_records, driver, files, kill_all, left_after, no_step_back, process_of, rows_of, wait_for
from PIL import Image

from raysparse import rng, space
from raysparse.errors import RanksApart
from raysparse.space import Sweep
from raysparse.sweep import preparing, trial_log, tuner
from raysparse.sweep.board import Board
from raysparse.sweep.journal import Event, read
from raysparse.sweep.leaving import NodeGoes
from raysparse.sweep.worker import OTHERS_LOST, _lost_because, _raised
from raysparse.train import run, state

STEPS, EVERY = 240, 80  # so far apart that ranks are between two reports when the driver hears of one
LATENTS: dict[str, Any] = {
    "data": {"name": "imagefolder", "options": {"size_px": 16, "flips": True, "validation_examples": 4}},
    "model": {
        "name": "latent_unet",
        "options": {
            "sample_size": 8,
            "block_out_channels": [8, 8],
            "attention_levels": [False, True],
            "layers_per_block": 1,
            "attention_head_dim": 8,
            "norm_num_groups": 4,
        },
    },
    "first_stage": {
        "options": {
            "block_out_channels": [8, 8],
            "attention_levels": [False, False],
            "layers_per_block": 1,
            "norm_num_groups": 4,
        }
    },
    "train": {"steps": STEPS, "batch_size": 8},
    "evaluate": {
        "extractor": "oriented_energy",
        "every_steps": EVERY,
        "generated": 16,
        "ddim_steps": 2,
        "batch_size": 8,
        "kid_subsets": 2,
        "kid_subset_size": 8,
    },
}


def pictures(folder: Path) -> Path:
    draw = rng.numpy_generator(0, "pictures of a sweep")
    folder.mkdir()
    for number in range(24):
        Image.fromarray(draw.integers(0, 255, (16, 16, 3), np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_workers_train_past_the_loss_and_the_hang_of_one_and_an_error_is_not_tried_again(
    tmp_path: Path, sweep_of: Callable[..., Sweep], ray_home: Path
) -> None:
    """On latents of pictures, which are encoded on Ray, once, before the sweep."""
    grid = {"rigl": {"sparsity": [0.5], "update_interval": [7]}}
    places = {"source": str(pictures(tmp_path / "pictures")), "root": str(tmp_path / "data")}
    base = LATENTS | {"data": LATENTS["data"] | places}
    resources = {"workers": 2, "hung_after_s": 3}
    sweep = sweep_of(base=base, search=None, grid=grid, asha=None, confirm=None, resources=resources)
    out = tmp_path / "out"
    trials = [space.trial(preparing.with_whole_paths(sweep), point) for point in space.grid_points(sweep)]
    dense, rigl = (trial.trial_id for trial in trials)
    strikes = {EVERY: signal.SIGKILL, 2 * EVERY: signal.SIGSTOP}
    encoded: list[tuple[int, int]] = []
    preparing.prepare(sweep, progress=lambda done, total: encoded.append((done, total)), num_cpus=2, temp_dir=ray_home)
    assert encoded[-1][0] == encoded[-1][1] > 0
    (manifest,) = (tmp_path / "data").glob("imagefolder-*/manifest.json")
    stamp = manifest.stat().st_mtime_ns

    def on_event(item: Event) -> None:
        if item.kind == "planned" and item.trial_id == dense:  # rank 0 finds a file where it wants a folder
            (out / "trials" / dense).mkdir(parents=True)
            (out / "trials" / dense / "samples").touch()
        if item.kind == "report" and item.step in strikes:  # in its next steps, rank 1 is gone, or stands still
            os.kill(process_of(out, rigl, 1), strikes.pop(item.step))

    summary = tuner.run(sweep, out, command="", on_event=on_event, num_cpus=2, temp_dir=ray_home)
    assert not strikes
    events = list(read(out / "journal.jsonl"))
    no_step_back(events)
    states = {row.trial_id: (row.state, row.step) for row in summary.board.rows.values()}
    assert states == {dense: ("FAILED", 0), rigl: ("COMPLETED", STEPS)}
    assert str(summary.board.rows[dense].reason).startswith(("FileExistsError", "NotADirectoryError"))
    lost, hung = [str(item.reason) for item in events if item.kind == "note" and item.trial_id == rigl]
    # Whether Ray hears of the loss first, or of what it did to the other rank.
    assert re.match(r"(rank 1 was lost: .*|a rank was lost: the others .*); started again$", lost)
    # Busy where Ray's threads in it wait for a core.
    assert re.match(r"it hung: rank 0 (asleep|busy) at step \d+ .*; rank 1 stopped at step \d+ for ", hung)
    log = trial_log.path_of(out / "trials" / rigl, 1).read_text()
    assert " in train_rank\n" in log, "the stacks"
    assert max(map(len, log.splitlines())) < 1000, "Ray's lines of all metrics"

    check_records(out, summary.board)
    assert manifest.stat().st_mtime_ns == stamp, "encoded once"
    rows = rows_of(out)[rigl]
    assert [(row["world_size"], row["fid"] is not None) for row in rows] == [(2, True)] * (STEPS // EVERY)
    run.train(trials[-1], tmp_path / "alone", workers=2, device="cpu")
    found = [state.latest(place / "checkpoints" / rigl) for place in (out, tmp_path / "alone")]
    assert files(found[0]) == files(found[1]), "weights, masks, EMA and moments, bit for bit"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_saves_trials_of_two_workers_a_second_one_ends_at_once_and_both_go_on(
    tmp_path: Path, sweep_of: Callable[..., Sweep], ray_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYSPARSE_TEST", str(ray_home))
    base: dict[str, Any] = sweep_of().base
    # So far apart that a signal hardly ever meets a report, after which there is nothing new to save.
    base |= {"train": {"steps": 800, "batch_size": 8}, "evaluate": base["evaluate"] | {"every_steps": 200}}
    grid: dict[str, Any] = {"dense": {}}
    sweep = sweep_of(base=base, search=None, grid=grid, asha=None, confirm=None, resources={"workers": 2})
    out = tmp_path / "out"
    with driver("run", out, ray_home, sweep) as process:
        wait_for(out, process, reports=1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=90) == 130
    assert not left_after(10, ray_home)
    (row,) = Board.load(out).rows.values()
    saved = state.latest(out / "checkpoints" / row.trial_id)
    assert saved is not None
    assert state.manifest(saved)["step"] > row.step, "saved where it was, after its last report"

    with driver("resume", out, ray_home, sweep) as process:
        wait_for(out, process, reports=len(row.fids) + 1)
        before = interruptions(out)
        process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + 60
        while interruptions(out) == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)  # sent at once it would be one with the first
        assert process.wait(timeout=20) == 130
    summary = tuner.resume(out, num_cpus=2, temp_dir=ray_home)
    kill_all(ray_home)
    (row,) = summary.board.rows.values()
    assert (row.state, sorted(row.fids)) == ("COMPLETED", [200, 400, 600, 800])
    no_step_back(list(read(out / "journal.jsonl")))
    check_records(out, summary.board)


def interruptions(out: Path) -> int:
    """How often the driver has said that it was interrupted."""
    notes = (str(item.reason) for item in read(out / "journal.jsonl") if item.kind == "note")
    return sum(note.startswith("interrupted: ") for note in notes)


def test_what_a_worker_raises_is_told_from_a_worker_that_is_lost() -> None:
    from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError
    from ray.train.v2.api.exceptions import WorkerGroupError

    mistake = ValueError("no such class")
    assert _raised(WorkerGroupError("", {1: mistake})) is mistake
    assert _raised(WorkerGroupError("", {0: ActorDiedError()})) is None
    broken = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:3")
    assert _raised(WorkerGroupError("", {0: broken})) is None
    assert _raised(WorkerGroupError("", {0: broken, 1: ActorDiedError()})) is None
    gone = WorkerGroupError("", {0: broken, 1: RayActorError(error_msg="Worker exit detail: out of memory.")})
    assert _lost_because(gone) == "rank 1 was lost: out of memory"
    assert _lost_because(WorkerGroupError("", {0: broken})) == OTHERS_LOST
    killed = WorkerGroupError("", {0: OutOfMemoryError("running low on memory. It was 9GB used / 10GB limit (0.9)")})
    assert _raised(killed) is None
    assert _lost_because(killed) == "rank 0 was lost: Ray killed it because memory ran low (9GB used / 10GB limit)"
    leaves = NodeGoes("its node is being taken away; saved at step 7")
    assert _lost_because(WorkerGroupError("", {0: leaves, 1: broken})) == str(leaves)
    assert _raised(WorkerGroupError("", {0: leaves})) is None
    apart = RanksApart("rank 0 found the checkpoint of step 8, rank 1 that of step 4: see that")
    assert _raised(WorkerGroupError("", {0: apart, 1: apart})) is None
    assert _lost_because(WorkerGroupError("", {0: apart, 1: apart})) == str(apart)
