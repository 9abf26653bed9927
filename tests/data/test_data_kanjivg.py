"""KanjiVG: the published lengths on the real file, splits, and files that are not it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysparse.data import prepared
from raysparse.data.datasets import kanjivg
from raysparse.errors import UsageError


def test_strokes_by_hand() -> None:
    rows = np.array([[1, 2, 0], [3, 0, 1], [1, 1, 1], [0, -1, 0]], np.int16)
    assert [stroke.tolist() for stroke in kanjivg.strokes(rows, "x")] == [[[1, 2], [4, 2]], [[5, 3]], [[5, 2]]]


@pytest.mark.parametrize(
    "rows",
    [np.zeros((3, 2)), np.zeros(3), np.full((2, 3), np.nan), np.full((2, 3), 1e300), np.array([["a"] * 3])],
)
def test_other_rows_are_refused(rows: np.ndarray[Any, Any]) -> None:
    with pytest.raises(UsageError, match=r"file, train\[3\]: must be finite numbers"):
        kanjivg.strokes(rows, "file, train[3]")


@pytest.fixture(scope="module")
def real(kanjivg_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared.prepare("kanjivg", {}, kanjivg_path, tmp_path_factory.mktemp("kanjivg"))


def test_the_published_lengths(real: Path) -> None:
    data = prepared.open_split(real, "train")
    assert len(data) == 10_358
    assert round(float(data.lengths.mean()), 1) == 88.6
    assert np.percentile(data.lengths, 99) == 129
    assert data.lengths.max() == 165


def test_what_the_model_sees_of_the_real_sketches(real: Path) -> None:
    data = prepared.open_split(real, "train")
    batch = data.batch(np.arange(256))
    inside = np.arange(batch["x"].shape[1]) < batch["cond"]["lengths"].numpy()[:, None]
    rows = batch["x"].numpy()[inside]
    assert set(rows[:, 2].tolist()) == {0, 1}
    assert 0.05 < rows[:, 2].mean() < 0.2  # a stroke has about nine points
    radii = [np.hypot(*points[:, :2].T).max() for points in batch["x"].numpy()]
    assert 9 < np.mean(radii) <= 10
    images = data.images(np.arange(256)).float()
    assert 0.75 < (images / 255).mean() < 0.95  # lines on a white ground


def test_reference_option(kanjivg_path: Path, tmp_path: Path) -> None:
    sizes = {}
    for choice in ("train", "test", "all"):
        folder = prepared.prepare("kanjivg", {"reference": choice, "spacing": 0.3}, kanjivg_path, tmp_path)
        assert len(prepared.open_split(folder, "validation")) == 1_100
        sizes[choice] = len(prepared.open_split(folder, "reference"))
    assert sizes == {"train": 10_358, "test": 1_100, "all": 11_458}


def test_a_damaged_file_of_a_known_name_is_refused(kanjivg_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "kanji.rdp100.npz"
    content = bytearray(kanjivg_path.read_bytes())
    content[1_000_000] ^= 1
    copy.write_bytes(content)
    for source in (copy, tmp_path):  # the file, or its folder
        with pytest.raises(UsageError, match=r"rdp100.npz is damaged or another version: its sha256 is"):
            prepared.prepare("kanjivg", {}, source, tmp_path / "root")
    renamed = tmp_path / "mine.npz"
    shutil.move(copy, renamed)
    with pytest.raises(UsageError, match=r"mine.npz.*damaged"):  # the archive's own checksum
        prepared.prepare("kanjivg", {}, renamed, tmp_path / "root")
    assert not list((tmp_path / "root").glob("*"))


def test_lacking_arrays_and_no_sketches(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    np.savez(path, train=np.empty(0, object))
    with pytest.raises(UsageError, match="has no array valid, test"):
        prepared.prepare("kanjivg", {}, path, tmp_path / "root")
    np.savez(path, **dict.fromkeys(("train", "valid", "test"), np.empty(0, object)))
    with pytest.raises(UsageError, match="no examples in train, validation, reference"):
        prepared.prepare("kanjivg", {}, path, tmp_path / "root")
