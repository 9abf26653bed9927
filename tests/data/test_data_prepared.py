"""Prepared folders: whole or absent, found again, damage named, builders that do not harm each other."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from raysparse.data import prepared
from raysparse.data.sketch import SketchOptions, Spec
from raysparse.errors import UsageError

SPEC = Spec(name="toy", title="", licence="", citation="", source="toys", splits={})


def contents(n: int = 10) -> prepared.Contents:
    lengths = np.arange(2, n + 2)
    points = np.arange(3 * lengths.sum(), dtype=np.float32).reshape(-1, 3)
    edge = n - 2
    splits = {"train": range(edge), "validation": range(edge, n), "reference": range(edge // 2, edge)}
    return prepared.Contents(points, lengths, splits, labels=np.arange(n) % 2, classes=("a", "b"))


def build(root: Path, n: int = 10, source_hash: str = "s") -> Path:
    return prepared.build(SPEC, SketchOptions(), source_hash=source_hash, root=root, make=lambda: contents(n))


def test_splits_are_what_was_made(tmp_path: Path) -> None:
    folder = build(tmp_path)
    made = contents()
    ends = np.cumsum(made.lengths)
    for split, place in made.splits.items():
        data = prepared.open_split(folder, split)
        assert data.lengths.tolist() == made.lengths[place.start : place.stop].tolist()
        assert data.labels is not None
        assert data.labels.tolist() == [i % 2 for i in place]
        first = data.batch(np.array([0]))["x"].numpy()[0]
        np.testing.assert_array_equal(first, made.points[ends[place.start] - made.lengths[place.start] :][: len(first)])
        assert data.num_classes == 2
    assert isinstance(prepared.open_split(folder, "train").points, np.memmap)
    assert not prepared.open_split(folder, "train").points.flags.writeable
    prepared.verify(folder)


def test_the_content_hash_is_of_the_examples_and_nothing_else(tmp_path: Path) -> None:
    first, second = build(tmp_path / "a"), build(tmp_path / "b", source_hash="other")
    hashes = {split: prepared.open_split(first, split).content_hash for split in prepared.SPLITS}
    assert len(set(hashes.values())) == 3
    assert hashes == {split: prepared.open_split(second, split).content_hash for split in prepared.SPLITS}
    assert prepared.open_split(build(tmp_path / "c", n=12), "train").content_hash != hashes["train"]


def test_it_is_made_once_and_named_by_options_and_source(tmp_path: Path) -> None:
    folder = build(tmp_path)
    assert folder.name.startswith("toy-")

    def never() -> prepared.Contents:
        raise AssertionError("made again")

    assert prepared.build(SPEC, SketchOptions(), source_hash="s", root=tmp_path, make=never) == folder
    other = prepared.build(SPEC, SketchOptions(spacing=0.2), source_hash="s", root=tmp_path, make=contents)
    assert len({folder, other, build(tmp_path, source_hash="t")}) == 3


def test_a_failing_recipe_leaves_nothing(tmp_path: Path) -> None:
    def fails() -> prepared.Contents:
        raise UsageError("bad line")

    with pytest.raises(UsageError, match="bad line"):
        prepared.build(SPEC, SketchOptions(), source_hash="s", root=tmp_path, make=fails)
    assert list(tmp_path.iterdir()) == []


def test_no_examples_is_an_error(tmp_path: Path) -> None:
    nothing = prepared.Contents(
        np.zeros((0, 3), np.float32), np.zeros(0, np.int64), dict.fromkeys(prepared.SPLITS, range(0))
    )
    with pytest.raises(UsageError, match=r"'toy': no examples in train, validation, reference.*Expected: toys"):
        prepared.build(SPEC, SketchOptions(), source_hash="s", root=tmp_path, make=lambda: nothing)
    assert list(tmp_path.iterdir()) == []


def test_damage_is_named_with_what_to_do(tmp_path: Path) -> None:
    folder = build(tmp_path)
    with pytest.raises(UsageError, match=r"unknown split 'trian' \(did you mean 'train'"):
        prepared.open_split(folder, "trian")
    whole = (folder / "points.npy").read_bytes()
    (folder / "points.npy").write_bytes(whole[:-4] + b"\0\0\0\1")
    prepared.open_split(folder, "train")  # opening checks sizes only
    with pytest.raises(UsageError, match=r"points.npy is damaged.*delete the folder"):
        prepared.verify(folder)
    (folder / "points.npy").write_bytes(whole[:-4])
    with pytest.raises(UsageError, match=r"points.npy is damaged \(\d+ bytes instead of \d+\)"):
        prepared.open_split(folder, "train")
    (folder / "points.npy").unlink()
    with pytest.raises(UsageError, match=r"points.npy is missing"):
        prepared.open_split(folder, "train")
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UsageError, match=r"manifest.json is damaged"):
        prepared.open_split(folder, "train")
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match=r"manifest.json is damaged \(classes: is missing\); delete"):
        prepared.open_split(folder, "train")
    with pytest.raises(UsageError, match="not a prepared data set"):
        prepared.open_split(tmp_path, "train")


def test_a_damaged_folder_without_manifest_is_replaced(tmp_path: Path) -> None:
    folder = build(tmp_path)
    (folder / "manifest.json").unlink()
    assert build(tmp_path) == folder
    prepared.verify(folder)


def _slow_build(root: str, began: Path, others: Sequence[Path] = (), seconds: float = 60.0) -> None:
    """A build that lasts until the others have begun, or so long."""

    def make() -> prepared.Contents:
        began.touch()
        deadline = time.monotonic() + seconds
        while not (others and all(other.exists() for other in others)) and time.monotonic() < deadline:
            time.sleep(0.02)
        return contents()

    prepared.build(SPEC, SketchOptions(), source_hash="s", root=Path(root), make=make)


def test_two_builders_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    marks = [tmp_path / f"mark{i}" for i in range(2)]
    root = tmp_path / "root"
    workers = [context.Process(target=_slow_build, args=(str(root), mark, marks)) for mark in marks]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert all(mark.exists() for mark in marks)
    (folder,) = root.iterdir()
    prepared.verify(folder)


def test_what_a_killed_builder_leaves_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    root, mark = tmp_path / "root", tmp_path / "mark"
    worker = multiprocessing.get_context("spawn").Process(target=_slow_build, args=(str(root), mark))
    worker.start()
    deadline = time.monotonic() + 60
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    (left,) = root.iterdir()
    living = root / ".toy-other.x.tmp"
    living.mkdir()
    for folder in (left, living):
        os.utime(folder, (0, 0))
    handle = os.open(living, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        folder = build(root)
    finally:
        os.close(handle)
    assert sorted(root.iterdir()) == sorted([folder, living])


def test_options_are_checked_with_the_nearest_key(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown key 'spacnig' \(did you mean 'spacing'\?\)"):
        prepared.prepare("hershey", {"spacnig": 0.1}, root=tmp_path)
    with pytest.raises(UsageError, match="spacing"):
        prepared.prepare("hershey", {"spacing": -1}, root=tmp_path)
    with pytest.raises(UsageError, match=r"spacing: got 1e-09: .* greater than or equal to 0\.001"):
        prepared.prepare("hershey", {"spacing": 1e-9}, root=tmp_path)
    with pytest.raises(UsageError, match=r"unknown dataset 'hershy'"):
        prepared.prepare("hershy", root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot prepare 'hershey' in .*file"):
        prepared.prepare("hershey", root=tmp_path / "file")


def test_a_set_that_no_memory_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = mock.Mock(side_effect=MemoryError("Unable to allocate 39.7 TiB"))
    monkeypatch.setattr("raysparse.data.datasets.hershey.prepare", told)
    with pytest.raises(UsageError, match=r"'hershey': not enough memory \(Unable to allocate 39\.7 TiB\)$"):
        prepared.prepare("hershey", root=tmp_path)


def test_default_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAYSPARSE_DATA", str(tmp_path))
    assert prepared.default_root() == tmp_path
    monkeypatch.delenv("RAYSPARSE_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert prepared.default_root() == tmp_path / "raysparse" / "data"


def test_the_manifest_tells_where_the_data_come_from(tmp_path: Path) -> None:
    manifest = json.loads((build(tmp_path) / "manifest.json").read_text())
    assert manifest["spec"]["source"] == "toys"
    assert manifest["source_sha256"] == "s"
    assert manifest["mean_points"] == 6.5
    assert manifest["options"]["spacing"] == 0.05
