"""Preparing pictures: whole or absent, continued after a kill, kept when the disk is full, made once by two."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_pictures import manifest, prepare
from toy_encoder import ToyEncoder

from raysparse import files
from raysparse.data import prepared, table
from raysparse.errors import UsageError


def _slow_prepare(source: str, root: str, log: str, seconds: float) -> None:
    encoder = ToyEncoder(seconds=seconds, log=log)
    prepare(Path(source), Path(root), encoder=encoder)


def _started(*arguments: Any) -> Any:
    worker = multiprocessing.get_context("spawn").Process(target=_slow_prepare, args=arguments)
    worker.start()
    return worker


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_prepare_goes_on_from_its_finished_shards(source: Path, tmp_path: Path) -> None:
    root, log = tmp_path / "root", tmp_path / "log"
    worker = _started(str(source), str(root), str(log), 0.02)

    def finished() -> list[Path]:
        return sorted(root.glob(".imagefolder-*.partial/share/train-*.parquet"))

    _wait_for(lambda: len(finished()) == 2)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    kept = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in finished()}
    assert len(kept) == 2
    litter = finished()[0].with_name(".train-00002-of-00003.parquet.x.tmp")
    litter.write_text("half a shard")  # what a kill in the middle of a write leaves
    log.unlink()
    folder = prepare(source, root, encoder=ToyEncoder(seconds=0.0, log=str(log)))
    assert len(log.read_text().split()) == 26 * 2 + 10  # the third shard of train, and validation
    now = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (folder / "share").iterdir()}
    assert all(now[path.name] == state for path, state in kept.items())
    assert sorted(path.name for path in root.iterdir()) == sorted([folder.name, "sources"])
    assert not list(folder.rglob("*.tmp"))
    prepared.verify(folder)
    assert manifest(folder) == manifest(prepare(source, tmp_path / "never killed"))


def _left_half_done(source: Path, root: Path) -> tuple[Path, list[Path]]:
    """The partial folder of a prepare that failed after its second shard."""

    def two(function: Callable[[Any], Any], tasks: Sequence[Any], /) -> Iterator[Any]:
        yield from map(function, tasks[:2])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, root, run=two)
    (partial,) = root.glob(".imagefolder-*.partial")
    return partial, sorted((partial / "share").iterdir())


def test_finished_shards_are_checked_before_they_are_reused(source: Path, tmp_path: Path) -> None:
    expected = manifest(prepare(source, tmp_path / "whole"))
    for damage in (lambda whole: whole[:-7], lambda whole: whole[:300] + b"\xff" + whole[301:], lambda _: b""):
        _, (first, _second) = _left_half_done(source, tmp_path / "root")
        first.write_bytes(damage(first.read_bytes()))
        made: list[str] = []

        def run(function: Callable[[Any], Any], tasks: Sequence[Any], /, made: list[str] = made) -> Iterator[Any]:
            made.extend(task.path.name for task in tasks)
            return map(function, tasks)

        folder = prepare(source, tmp_path / "root", run=run)
        assert first.name in made
        assert len(made) == len(expected["files"]) - 1
        assert manifest(folder) == expected
        shutil.rmtree(tmp_path / "root")


def test_a_shard_of_another_source_is_not_reused(source: Path, tmp_path: Path) -> None:
    _, (first, second) = _left_half_done(source, tmp_path / "root")
    shutil.copy(second, first)
    assert manifest(prepare(source, tmp_path / "root")) == manifest(prepare(source, tmp_path / "whole"))


def test_a_full_disk_keeps_what_is_finished(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = table.write_parquet, []

    def full(path: Path, *arguments: Any) -> None:
        calls.append(path)
        if len(calls) == 3:
            with files.atomic_path(path) as temporary:
                temporary.write_text("as much as fitted")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, *arguments)

    monkeypatch.setattr(table, "write_parquet", full)
    with pytest.raises(UsageError, match=r"is full \(No space left on device\)\. 2 of 7 shards are finished and kept"):
        prepare(source, tmp_path)
    (partial,) = tmp_path.glob(".imagefolder-*.partial")
    assert len(list((partial / "share").iterdir())) == 2
    folder = prepare(source, tmp_path)
    assert len(calls) == 3 + 5
    prepared.verify(folder)


def test_pyarrow_says_that_a_disk_is_full_by_its_number(tmp_path: Path) -> None:
    """What the message above depends on."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    full = tmp_path / "full"
    full.symlink_to("/dev/full")  # a link: pyarrow removes what it could not write, which as root is the device itself
    big = pa.table({"x": np.random.default_rng(0).normal(size=1 << 17)})
    with pytest.raises(OSError, match="No space left") as caught:
        pq.write_table(big, full)
    assert caught.value.errno == errno.ENOSPC
    assert os.path.exists("/dev/full")


@pytest.mark.parametrize("failing", ["write_arrow", "write_parquet"])
def test_other_errors_of_the_disk_keep_what_is_finished(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fails(*_: Any) -> None:
        raise OSError(errno.EDQUOT if failing == "write_arrow" else errno.EIO, "fails")

    with monkeypatch.context() as patched:
        patched.setattr(table, failing, fails)
        with pytest.raises(UsageError, match="is full" if failing == "write_arrow" else "cannot prepare 'imagefolder'"):
            prepare(source, tmp_path)
    prepared.verify(prepare(source, tmp_path))


def test_two_at_once_share_the_work(source: Path, tmp_path: Path) -> None:
    root, log = tmp_path / "root", tmp_path / "log"
    workers = [_started(str(source), str(root), str(log), 0.005) for _ in range(2)]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(log.read_text().split()) == 190
    (folder,) = root.glob("imagefolder-*")
    prepared.verify(folder)
    assert sorted(path.name for path in root.iterdir()) == sorted([folder.name, "sources"])


def test_a_folder_without_manifest_is_replaced(source: Path, tmp_path: Path) -> None:
    folder = prepare(source, tmp_path)
    (folder / "manifest.json").unlink()
    with pytest.raises(UsageError, match="not a prepared data set"):
        prepared.open_split(folder, "train")
    assert prepare(source, tmp_path) == folder
    prepared.verify(folder)
