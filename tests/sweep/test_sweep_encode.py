"""Shards as Ray tasks: order of arrival, lost processes, errors, and what they leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raysparse import config
from raysparse.data.shards import Run
from raysparse.errors import UsageError
from raysparse.models import autoencoder
from raysparse.resources import Resources
from raysparse.sweep import encode

pytestmark = pytest.mark.ray

DRIVER = """
import sys, time
from pathlib import Path
from raysparse.sweep.encode import ray_run
from raysparse.files import write_text
def shard(path):
    if path.name != "0":
        path.with_suffix(".began").touch()
        time.sleep(600)
    write_text(path, "whole")
    return path
folder, home = map(Path, sys.argv[1:])
with ray_run(folder, num_cpus=2, temp_dir=home) as run:
    for path in run(shard, [folder / str(n) for n in range(4)]):
        print(path, flush=True)
"""

PREPARE = """
import json, sys
from pathlib import Path
from raysparse import config
from raysparse.sweep import encode
print(encode.prepare(config.parse(json.loads(sys.argv[1]), "test"), cpus=2, temp_dir=Path(sys.argv[2])))
"""


def square(number: int) -> int:
    return number * number


def late_square(task: tuple[Path, int]) -> int:
    """The first one waits until the driver has another one's result."""
    folder, number = task
    deadline = time.monotonic() + 60
    while number == 0 and not (folder / "had one").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return number * number


def span(task: tuple[Path, int]) -> tuple[float, float]:
    """From when to when it ran: .3 s, and until so many have begun in this folder."""
    folder, together = task
    start, deadline = time.time(), time.monotonic() + 30  # a second process may be long in starting
    (folder / str(os.getpid())).touch()
    time.sleep(0.3)
    while len(list(folder.iterdir())) < together and time.monotonic() < deadline:
        time.sleep(0.02)
    return start, time.time()


def where(_: int) -> tuple[int, tuple[int, str, str]]:
    import torch

    return os.getpid(), (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], os.environ["CUDA_VISIBLE_DEVICES"])


def dies_once(path: Path) -> int:
    """The first process that gets this task ends as by kill -9."""
    tries = len(list(path.parent.glob(f"{path.name}.try*")))
    (path.parent / f"{path.name}.try{tries}").touch()
    if tries == 0 and path.name == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return tries


def dies(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fails(number: int) -> int:
    if number == 1:
        raise UsageError("picture 1 is the user's mistake; mend it")
    if number == 2:
        raise OSError(28, "No space left on device")
    return number


@pytest.fixture(scope="module")
def run(ray_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test file
    with encode.ray_run(tmp_path_factory.mktemp("log"), num_cpus=2, temp_dir=ray_home) as started:
        yield started
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_results_come_as_they_finish(run: Run, tmp_path: Path) -> None:
    results = run(late_square, [(tmp_path, number) for number in range(9)])
    first = next(results)
    assert first != 0, "the slow first task held up the others"
    (tmp_path / "had one").touch()
    assert sorted([first, *results]) == [n * n for n in range(9)]
    assert list(run(square, [])) == []


def test_a_task_has_its_threads_and_no_gpu_that_it_did_not_ask_for(run: Run) -> None:
    found = list(run(where, range(6)))
    assert {settings for _, settings in found} == {(1, "1", "")}
    assert os.getpid() not in {pid for pid, _ in found}


def test_a_task_whose_process_was_killed_is_tried_again(run: Run, tmp_path: Path) -> None:
    assert sorted(run(dies_once, [tmp_path / str(n) for n in range(4)])) == [0, 0, 0, 1]


def test_a_task_that_kills_every_process_ends_the_run(run: Run) -> None:
    with pytest.raises(UsageError, match="died 3 times"):
        list(run(dies, [0]))


def test_a_tasks_own_error_comes_back_as_it_was(run: Run) -> None:
    with pytest.raises(UsageError) as caught:
        list(run(fails, [0, 1]))
    assert str(caught.value) == "picture 1 is the user's mistake; mend it"
    assert type(caught.value) is UsageError
    with pytest.raises(OSError, match="No space left") as full:
        list(run(fails, [2]))
    assert full.value.errno == 28
    assert "in fails" in full.value.__notes__[0], "the traceback in the worker is lost"
    assert sorted(run(square, [1, 2])) == [1, 4], "the run cannot be used after an error"


@pytest.mark.slow
def test_ctrl_c_ends_all_and_leaves_finished_shards(ray_home: Path, tmp_path: Path) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path), str(ray_home)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        _wait(lambda: (tmp_path / "0").exists() and len(list(tmp_path.glob("*.began"))) == 2, 60)
        driver.send_signal(signal.SIGINT)
        _, errors = driver.communicate(timeout=120)
    finally:
        driver.kill()
    assert b"KeyboardInterrupt" in errors
    assert (tmp_path / "0").read_text() == "whole"
    assert not any((tmp_path / str(n)).exists() for n in (1, 2, 3))


@pytest.mark.slow
def test_a_prepare_that_is_killed_goes_on_and_gives_what_one_process_gives(
    ray_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(320):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number:03}.png")
    data = {"name": "imagefolder", "source": str(pictures), "root": str(tmp_path / "ray")}
    content = {
        "data": {**data, "options": {"size_px": 32, "flips": True}},
        "first_stage": {"options": autoencoder.SMALL},
    }
    driver = [sys.executable, "-c", PREPARE, json.dumps(content), str(ray_home)]
    killed = subprocess.Popen(driver, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(lambda: list(tmp_path.glob("ray/.*.partial/share/*.parquet")), 90)
    finally:
        killed.kill()
        killed.wait()
    assert not list(tmp_path.glob("ray/*/manifest.json")), "it was too fast to be killed"
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("ray/.*.partial/share/*.parquet")}
    done = subprocess.run(driver, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    after = {path.name: path.stat().st_mtime_ns for path in (folder / "share").iterdir()}
    assert before.items() <= after.items(), "a finished shard was made again"
    assert len(after) > len(before) > 0

    content["data"]["root"] = str(tmp_path / "alone")
    monkeypatch.setattr(encode, "ray_for", None)
    alone = encode.prepare(config.parse(content, "test"), cpus=1)
    assert alone.name == folder.name
    assert [path.name for path in sorted(alone.iterdir())] == [path.name for path in sorted(folder.iterdir())]
    for name in ("train.arrow", "validation.arrow", "reference.arrow", "manifest.json"):
        assert (alone / name).read_bytes() == (folder / name).read_bytes(), name


def test_what_does_not_fit_is_said_before_anything_starts(tmp_path: Path) -> None:
    for options, words in (
        ({"threads": 3, "num_cpus": 2}, "needs 1 worker x 3 CPUs, but this machine has 2"),
        ({"gpus_per_task": -1}, "0 or more, got -1"),
    ):
        with pytest.raises(UsageError, match=words), encode.ray_run(tmp_path, **options):
            pass


def test_no_more_run_at_a_time_than_memory_has_room_for(run: Run, tmp_path: Path) -> None:
    import ray

    room = int(ray.nodes()[0]["Resources"]["memory"])
    for share, together in ((0.6, 1), (0.3, 2), (2, 1)):
        folder = tmp_path / str(share)
        folder.mkdir()
        spans = list(encode._run(span, [(folder, together)] * 4, Resources(), int(share * room)))
        assert max(sum(a <= start < b for a, b in spans) for start, _ in spans) == together, share


def test_nothing_starts_before_a_result_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(encode, "ray_for", refuse)
    assert list(encode.run_on(tmp_path)(square, [])) == []
    lazy = encode.run_on(tmp_path, num_cpus=1)(square, [1])
    with pytest.raises(AssertionError, match="Ray was started"):
        next(lazy)


def _wait(condition, seconds: float) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)
