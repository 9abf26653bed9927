"""Preprocessing: small sketches by hand, then the rules as invariants, then a plain per-sketch loop beside it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysparse.data import synthetic
from raysparse.data.preprocess import Sequences, Strokes, are_coordinates, chunks, concatenate, normalise, reorder


def prepared(*drawings: list[list[tuple[float, float]]], spacing: float = 0.5, point_limit: int = 300) -> Sequences:
    raw = Strokes.of([[np.array(stroke, float).reshape(-1, 2) for stroke in drawing] for drawing in drawings])
    return normalise(raw, spacing=spacing, point_limit=point_limit)


def test_a_line_by_hand() -> None:
    # length 4, radius 4: four units of .25 make int(1 / .25) = 4 points; the first, at 0, is left out
    found = prepared([[(3, 7), (3, 11)]], spacing=0.25)
    np.testing.assert_allclose(found.points, [[0, 10 / 3, 0], [0, 20 / 3, 0], [0, 10, 1]], rtol=1e-6)
    assert found.lengths.tolist() == [3]
    assert found.points.dtype == np.float32


def test_a_corner_is_measured_along_the_stroke() -> None:
    # radius sqrt(2), length 2 / sqrt(2): int(1.414 / .7) = 2 points, the two ends; the corner between them goes
    found = prepared([[(0, 0), (1, 0), (1, 1)]], spacing=0.7)
    np.testing.assert_allclose(found.points, [[10 / 2**0.5, 10 / 2**0.5, 1]], rtol=1e-6)


def test_two_strokes_by_hand_with_the_pen_on_their_last_points() -> None:
    found = prepared([[(1, 1), (1, 3)], [(5, 1), (4, 1)]], spacing=1)
    # radius 4 by the second stroke's start; both strokes have their two ends
    np.testing.assert_allclose(found.points, [[0, 5, 1], [10, 0, 0], [7.5, 0, 1]])


def test_one_point_strokes_are_dropped_and_do_not_set_the_origin_or_the_scale() -> None:
    plain = prepared([[(1, 1), (1, 3)]])
    dotted = prepared([[(50, 50)], [(1, 1), (1, 3)], [(-99, 0)]])
    np.testing.assert_array_equal(plain.points, dotted.points)


@pytest.mark.parametrize("nothing", [[], [[(1, 2)]], [[(1, 2), (1, 2)]], [[]]])
def test_a_sketch_without_extent_is_dropped(nothing: list[list[tuple[float, float]]]) -> None:
    found = prepared(nothing, [[(0, 0), (1, 0)]], nothing)
    assert found.lengths.tolist() == [1]
    assert prepared(nothing).lengths.tolist() == []
    assert prepared(nothing).points.shape == (0, 3)


def test_the_point_limit_counts_the_first_point_too() -> None:
    line = [[(0, 0), (1, 0)]]  # int(1 / .01) = 100 points
    assert prepared(line, spacing=0.01, point_limit=101).lengths.tolist() == [99]
    assert prepared(line, spacing=0.01, point_limit=100).lengths.tolist() == []


strokes_strategy = st.lists(
    st.lists(st.tuples(*[st.integers(-50, 50)] * 2), min_size=1, max_size=8), min_size=1, max_size=5
)


@settings(max_examples=150)
@given(st.lists(strokes_strategy, min_size=1, max_size=4), st.sampled_from([0.05, 0.1, 0.37]))
def test_invariants(drawings: list[list[list[tuple[int, int]]]], spacing: float) -> None:
    found = prepared(*drawings, spacing=spacing, point_limit=10**9)
    assert found.lengths.sum() == len(found.points)
    assert np.isfinite(found.points).all()
    kept = [
        strokes
        for strokes in ([np.array(s, float) for s in d if len(s) > 1] for d in drawings)
        if strokes and max(np.hypot(*(s - strokes[0][0]).T).max() for s in strokes) > 0
    ]
    assert len(kept) == len(found.lengths)
    ends = np.cumsum(found.lengths)
    for strokes, start, end in zip(kept, ends - found.lengths, ends, strict=True):
        rows = found.points[start:end]
        radius = max(np.hypot(*(s - strokes[0][0]).T).max() for s in strokes)
        assert np.hypot(rows[:, 0], rows[:, 1]).max() <= 10 * (1 + 1e-6)
        assert rows[:, 2].sum() == len(strokes)
        whole = np.vstack([np.zeros((1, 3)), rows])
        made = np.split(whole[:, :2], np.flatnonzero(whole[:, 2]) + 1)[:-1]
        for stroke, resampled in zip(strokes, made, strict=True):
            scaled = (stroke - strokes[0][0]) * 10 / radius
            length = np.hypot(*np.diff(scaled, axis=0).T).sum()
            assert len(resampled) in {max(2, int(length / 10 / spacing + e)) for e in (-1e-9, 0, 1e-9)}
            np.testing.assert_allclose(resampled[[0, -1]], scaled[[0, -1]], atol=1e-5)  # ends kept
            gaps = np.hypot(*np.diff(resampled, axis=0).T)
            assert gaps.max() <= length / (len(resampled) - 1) + 1e-5  # equal along the stroke, at most that across it


def _plainly(drawing: list[np.ndarray], spacing: float) -> np.ndarray:
    """The rules of PAPER, one sketch at a time."""
    strokes = [stroke - drawing[0][0] for stroke in drawing if len(stroke) > 1]
    radius = max(np.hypot(*stroke.T).max() for stroke in strokes)
    rows = []
    for stroke in strokes:
        along = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(stroke / radius, axis=0).T))])
        where = np.linspace(0, along[-1], max(2, int(along[-1] / spacing)))
        xy = np.column_stack([np.interp(where, along, axis) for axis in (stroke / radius).T])
        rows.append(np.column_stack([xy * 10, np.arange(len(xy)) == len(xy) - 1]))
    return np.concatenate(rows)[1:]


@pytest.mark.parametrize("spacing", [0.05, 0.1])
def test_all_at_once_equals_one_at_a_time(spacing: float) -> None:
    drawings = synthetic.doodles(200)
    found = concatenate([normalise(raw, spacing=spacing) for raw in chunks(drawings, size=64)])
    plain = [_plainly(drawing, spacing) for drawing in drawings]
    assert found.lengths.tolist() == [len(rows) for rows in plain]
    np.testing.assert_allclose(found.points, np.concatenate(plain), atol=1e-5)


def test_reorder() -> None:
    found = reorder(Sequences(np.arange(18, dtype=np.float32).reshape(6, 3), np.array([1, 2, 3])), np.array([2, 0, 1]))
    assert found.lengths.tolist() == [3, 1, 2]
    assert found.points[:, 0].tolist() == [9, 12, 15, 0, 3, 6]


def test_are_coordinates() -> None:
    assert are_coordinates(np.array([1, -5]))
    assert are_coordinates(np.zeros((0, 2)))
    for bad in (np.nan, np.inf, -1e9):
        assert not are_coordinates(np.array([0.0, bad]))
    assert not are_coordinates(np.array(["1"]))
