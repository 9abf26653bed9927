"""The embedded data set: its size, its splits, and that it is the same everywhere."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from raysparse.data import prepared
from raysparse.data.datasets import hershey
from raysparse.data.preprocess import Strokes
from raysparse.errors import UsageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared.prepare("hershey", {}, root=tmp_path_factory.mktemp("hershey"))


def test_size(folder: Path) -> None:
    sizes = {split: len(prepared.open_split(folder, split)) for split in prepared.SPLITS}
    assert sizes == {"train": 3675, "validation": 1225, "reference": 2450}
    assert 40 < prepared.open_split(folder, "train").lengths.mean() < 43


def test_the_glyphs_differ_and_have_lines() -> None:
    glyphs = hershey.glyphs()
    assert len({b"|".join(stroke.tobytes() for stroke in glyph) for glyph in glyphs}) == len(glyphs) == 1225
    assert all(len(stroke) > 1 for glyph in glyphs for stroke in glyph)


def test_the_jitter_is_small_and_differs_by_draw_and_glyph() -> None:
    square = [np.array([[0, 0], [1, 0], [1, 1], [0, 1]], float)]
    raw = [hershey._jittered([square] * 200, draw).points.reshape(200, 4, 2) for draw in (0, 1)]
    assert np.array_equal(raw[0], hershey._jittered([square] * 200, 0).points.reshape(200, 4, 2))
    assert not np.isclose(raw[0], raw[1])[:, 1:].all(axis=(1, 2)).any()
    assert np.abs(raw[0] - square[0]).max() < 0.5
    angles = np.arctan2(raw[0][:, 1, 1], raw[0][:, 1, 0])
    assert 0.9 * hershey.ROTATION < np.abs(angles).max() <= hershey.ROTATION
    assert len(Strokes.of([square])) == 1


def test_no_sketch_is_in_two_splits_and_each_is_shuffled(folder: Path) -> None:
    parts = {}
    for split in prepared.SPLITS:
        data = prepared.open_split(folder, split)
        parts[split] = [data.points[a:b].tobytes() for a, b in itertools.pairwise(data.offsets)]
        halves = data.lengths[: len(data) // 2].mean(), data.lengths[len(data) // 2 :].mean()
        assert abs(halves[0] - halves[1]) < 4  # the fonts lie in order of their names, simple and ornate ones apart
    for one, other in itertools.combinations(parts.values(), 2):
        assert not set(one) & set(other)


def test_a_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="hershey is embedded"):
        prepared.prepare("hershey", {}, tmp_path, tmp_path)
