"""A trial's process: what it keeps, what it says again, and how it ends what is left of a killed sweep."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raysparse import space
from raysparse.diffusion import losses
from raysparse.metrics import fidelity
from raysparse.space import Sweep
from raysparse.sweep import patience
from raysparse.sweep.trainable import claimed, give_memory_back, keep_to_share, read_reports, train_rank
from raysparse.train import distributed, state

POINT = {"method": "rigl", "sparsity": 0.5, "prune_ratio": 0.5, "update_interval": 2}


class Killed(BaseException):
    """Ends a trial where it stands."""


@pytest.fixture
def told(tmp_path: Path, sweep_of: Callable[..., Sweep], ray_home: Path) -> dict[str, Any]:
    """What Tune tells a trial's process, with the data prepared."""
    from raysparse.train import setup

    trial = space.trial(sweep_of(), POINT)
    setup.prepare_data(trial)
    folder = tmp_path / "trials" / trial.trial_id
    folder.mkdir(parents=True)
    (folder / "trial.json").write_text(trial.dump_json())
    return {"trial_id": trial.trial_id, "results": str(tmp_path)}


def run(told: dict[str, Any], kill_at: int | None = None) -> list[dict[str, Any]]:
    said: list[dict[str, Any]] = []

    def say(metrics: dict[str, Any]) -> None:
        said.append(metrics)
        if metrics["step"] == kill_at:
            raise Killed

    if kill_at is None:
        train_rank(told, say)
    else:
        with pytest.raises(Killed):
            train_rank(told, say)
    return said


def fids(said: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(metrics["step"], metrics["fid"]) for metrics in said]


@pytest.mark.parametrize(("gpus", "limits"), [(0, []), (0.125, [0.125]), (1, []), (2, [])])
def test_a_trial_on_a_share_of_a_gpu_keeps_to_its_share_of_the_memory(
    told: dict[str, Any], monkeypatch: pytest.MonkeyPatch, gpus: float, limits: list[float]
) -> None:
    given: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", given.append)
    run(told | {"gpus_per_worker": gpus}, kill_at=2)
    assert given == limits


def test_a_trial_starts_without_what_the_one_before_it_held_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.nn.Linear(2, 2)
    before.itself = before  # as a recorded network
    held, found = weakref.ref(before), []
    del before
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: found.append(held()))
    gc.disable()
    try:
        give_memory_back("cpu")
        assert found == []
        give_memory_back("cuda:0")
    finally:
        gc.enable()
    assert found == [None]


@pytest.mark.gpu
def test_what_is_beyond_the_share_of_the_memory_is_refused() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    whole = torch.cuda.get_device_properties(0).total_memory
    keep_to_share(0.125)
    try:
        torch.empty(whole // 10, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(whole // 6, dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def test_a_restarted_trial_says_all_again_and_goes_on_to_the_same_bits(told: dict[str, Any], tmp_path: Path) -> None:
    first = run(told, kill_at=4)
    assert [metrics["step"] for metrics in first] == [2, 4]
    again = run(told)
    assert fids(again)[:2] == fids(first)
    assert [metrics["step"] for metrics in again] == [2, 4, 6, 8]
    folder = tmp_path / "trials" / told["trial_id"]
    kept = read_reports(folder)
    assert [(report.step, report.fid) for report in kept] == fids(again)
    assert all(report.samples_png for report in kept)
    assert "samples_png" not in again[0]
    for path in (tmp_path / "checkpoints" / told["trial_id"]).iterdir():
        path.rename(path.with_name(f"old-{path.name}"))  # from the start, for comparison
    (folder / "reports.jsonl").unlink()
    assert fids(run(told)) == fids(again)


def test_a_copy_beside_the_checkpoints_is_not_gone_on_from(told: dict[str, Any], tmp_path: Path) -> None:
    first = run(told, kill_at=4)
    copy = tmp_path / "checkpoints" / told["trial_id"] / "step-000000004.bak"
    shutil.copytree(copy.with_suffix(""), copy)
    (copy / "manifest.json").write_text("a person changed it")
    assert fids(run(told))[:2] == fids(first)
    assert copy.is_dir()


def test_a_report_without_its_checkpoint_is_made_again(told: dict[str, Any], tmp_path: Path) -> None:
    first = run(told, kill_at=4)
    checkpoints = tmp_path / "checkpoints" / told["trial_id"]
    assert [path.name for path in sorted(checkpoints.iterdir())] == ["step-000000002", "step-000000004"]
    damaged = checkpoints / "step-000000004" / "weights.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    (checkpoints / f"{state.TEMPORARY}x7").mkdir()  # of a process that was killed while it wrote
    again = run(told)
    assert [path.name for path in sorted(checkpoints.iterdir())] == ["step-000000006", "step-000000008"]
    assert [metrics["step"] for metrics in again] == [2, 4, 6, 8]
    assert fids(again)[:2] == fids(first)


def test_a_checkpoint_of_another_version_is_kept_and_said(told: dict[str, Any], tmp_path: Path) -> None:
    run(told, kill_at=4)
    checkpoints = tmp_path / "checkpoints" / told["trial_id"]
    for manifest in checkpoints.glob("*/manifest.json"):
        outer = json.loads(manifest.read_text())
        outer["content"]["format"] = 99
        outer["sha256"] = hashlib.sha256(json.dumps(outer["content"], sort_keys=True).encode()).hexdigest()
        manifest.write_text(json.dumps(outer))
    (last,) = run(told)
    assert "has format 99, this raysparse reads" in last["failed"]
    assert [path.name for path in sorted(checkpoints.iterdir())] == ["step-000000002", "step-000000004"]


def test_a_checkpoint_of_other_data_is_kept_and_said(
    told: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who gives back the data can go on."""
    first = run(told, kill_at=4)
    with monkeypatch.context() as patch:
        patch.setattr("raysparse.train.setup._origin", lambda *_: {"examples": "another", "first_stage": None})
        (last,) = run(told)
    assert "trained on other data: its examples had another content" in last["failed"]
    checkpoints = tmp_path / "checkpoints" / told["trial_id"]
    assert [path.name for path in sorted(checkpoints.iterdir())] == ["step-000000002", "step-000000004"]
    assert fids(run(told))[:2] == fids(first)


def test_a_report_that_was_lost_beside_its_checkpoint_is_made_again(told: dict[str, Any], tmp_path: Path) -> None:
    first = run(told, kill_at=4)
    (tmp_path / "trials" / told["trial_id"] / "reports.jsonl").unlink()
    for name in (".reports.jsonl.k2x_8f.tmp", "samples/.4.png.k2x_8f.tmp"):  # of a process killed while it wrote
        (tmp_path / "trials" / told["trial_id"] / name).touch()
    again = run(told)
    assert not list((tmp_path / "trials").rglob("*.tmp"))
    assert [metrics["step"] for metrics in again] == [4, 6, 8]
    assert fids(again)[0] == fids(first)[1]


def test_all_ranks_say_the_reports_that_rank_0_has_kept(told: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kept = run(told, kill_at=4)
    from_rank_0, asked = distributed.from_rank_0, []

    def seen(value: Any, world_size: int) -> Any:
        asked.append(value)
        return from_rank_0(value, world_size)

    monkeypatch.setattr(distributed, "from_rank_0", seen)
    assert fids(run(told, kill_at=4)) == fids(kept)
    assert [report.step for report in asked[0]] == [2, 4]


def test_a_checkpoint_that_cannot_be_read_now_is_kept_and_waited_for(
    told: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(told, kill_at=4)
    monkeypatch.setattr(patience, "DELAYS_S", (0.0, 0.0))
    read_bytes, failures = Path.read_bytes, [5, 5]

    def fails_twice(path: Path) -> bytes:
        if path.name == "ema.safetensors" and failures:
            raise OSError(failures.pop(), "Input/output error")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", fails_twice)
    run(told)
    log = (tmp_path / "trials" / told["trial_id"] / "log.txt").read_text()
    assert "step-000000004 could not be read (Input/output error); trying again" in log
    assert log.count("goes on from step 4\n") == 1


def test_what_a_trial_raises_is_its_last_report(told: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "trials" / told["trial_id"]
    (folder / "samples").write_text("in the way")
    (last,) = run(told)
    assert last["failed"].startswith(("FileExistsError", "NotADirectoryError"))
    assert last["fid"] is None
    assert "Traceback" in (folder / "error.txt").read_text()


@pytest.mark.parametrize(
    ("place", "name", "value", "reason"),
    [
        (fidelity, "fid", math.nan, "FID became nan at step 2"),
        (fidelity, "fid", math.inf, "FID became inf at step 2"),
        (losses, "eps_mse", torch.tensor(math.nan, requires_grad=True), "loss became nan at step 1"),
    ],
)
def test_a_number_that_is_none_ends_the_trial_with_its_reason_and_no_fid(
    told: dict[str, Any], monkeypatch: pytest.MonkeyPatch, place: Any, name: str, value: Any, reason: str
) -> None:
    monkeypatch.setattr(place, name, lambda *words: value * 1)
    (last,) = run(told)
    assert (last["failed"], last["diverged"], last["fid"]) == (reason, True, None)


@pytest.mark.parametrize("line", ["{", "[]", '{"step": 2}', '{"step": "__import__"}', "\udcff", "[" * 10**5])
def test_damaged_reports_fail_the_trial_by_name(told: dict[str, Any], tmp_path: Path, line: str) -> None:
    path = tmp_path / "trials" / told["trial_id"] / "reports.jsonl"
    path.write_bytes(line.encode(errors="surrogateescape") + b"\n")
    (last,) = run(told)
    assert f"{path}, line 1 is damaged" in last["failed"]


def test_a_settings_file_that_is_no_trial_is_said_without_a_class_name(told: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "trials" / told["trial_id"] / "trial.json"
    path.write_text(json.dumps({"seed": -1}))
    (last,) = run(told)
    assert "seed: got -1" in last["failed"]
    assert "UsageError" not in last["failed"]


def test_a_process_left_of_a_killed_sweep_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raysparse.train.claims.ORPHAN_S", 0.3)
    code = "import sys,time;from pathlib import Path;from raysparse.sweep.trainable import claimed\n"
    code += "with claimed(Path(sys.argv[1])): print('mine', flush=True); time.sleep(60)"
    orphan = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert orphan.stdout
        assert orphan.stdout.readline() == b"mine\n"
        with claimed(tmp_path):
            assert orphan.wait(timeout=5) == -9
            assert (tmp_path / "lock").read_text().startswith(f"{os.getpid()} ")
    finally:
        orphan.kill()
        orphan.wait()
        if orphan.stdout:
            orphan.stdout.close()


def test_a_holder_on_another_machine_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raysparse.train.claims.ORPHAN_S", 0.1)
    with claimed(tmp_path):
        (tmp_path / "lock").write_text("1 elsewhere")
        with pytest.raises(RuntimeError, match="another process trains this trial: 1 elsewhere"), claimed(tmp_path):
            pass
