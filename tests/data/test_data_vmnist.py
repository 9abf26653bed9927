"""VMNIST: digits as classes, and pickles that are no sketch."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysparse.data import prepared
from raysparse.data.datasets import vmnist
from raysparse.errors import UsageError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return vmnist.tiny_source(folder)


def test_digits_are_the_classes(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    folder = prepared.prepare(
        "vmnist", {"conditional": True}, source, tmp_path / "root", progress=lambda *a: seen.append(a)
    )
    data = prepared.open_split(folder, "train")
    assert data.num_classes == 10
    assert len(data) + len(prepared.open_split(folder, "validation")) == 60
    assert data.labels is not None
    assert set(data.labels.tolist()) == set(range(10))


@pytest.mark.parametrize("kind", [list, np.array])
def test_lists_and_arrays_with_and_without_times(kind: Any, tmp_path: Path) -> None:
    path = tmp_path / "sketch"
    strokes = [[kind([1.0, 2.0, 4.0]), kind([0.0, 3.0, 5.0])], [kind([7, 8]), kind([9, 9]), kind([0, 1])]]
    path.write_bytes(pickle.dumps({"drawing": strokes, "word": "3"}))
    first, second = vmnist.read(path)
    assert first.tolist() == [[1, 0], [2, 3], [4, 5]]
    assert second.tolist() == [[7, 9], [8, 9]]


class _Runs:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (pickle.dumps({"drawing": [_Runs()]}), r"names (posix|nt)\.system"),
        (b"garbage", "damaged"),
        (pickle.dumps([1, 2]), "not a sketch"),
        (pickle.dumps({"drawings": []}), "not a sketch"),
        (pickle.dumps({"drawing": [[[1, 2, 3, 4]]]}), "1 rows instead of"),
        (pickle.dumps({"drawing": [[[1, 2], [float("inf"), 1]]]}), "finite"),
        (pickle.dumps({"drawing": [[[1, 2], [3]]]}), "not a sketch"),
    ],
)
def test_a_bad_pickle_is_named_and_nothing_is_left(source: Path, tmp_path: Path, content: bytes, reason: str) -> None:
    (source / "7" / "sketch_3").write_bytes(content)
    with pytest.raises(UsageError, match=rf"7.sketch_3.*{reason}"):
        prepared.prepare("vmnist", {}, source, tmp_path / "root")
    assert [p.name for p in (tmp_path / "root").iterdir()] == ["sources"]


def test_missing_digits_and_no_source(source: Path, tmp_path: Path) -> None:
    shutil.rmtree(source / "4")
    with pytest.raises(UsageError, match="has no subfolder 4"):
        prepared.prepare("vmnist", {}, source, tmp_path / "root")
    with pytest.raises(UsageError, match="no public download"):
        prepared.prepare("vmnist", {}, None, tmp_path / "root")
