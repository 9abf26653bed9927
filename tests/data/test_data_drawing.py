"""Drawing: where the ink is, how much, and that real and generated sketches are drawn by one rule."""

from __future__ import annotations

import time

import numpy as np
import pytest

from raysparse.data import drawing


def drawn(*rows: tuple[float, float, float], radius: float = 1.0) -> np.ndarray:
    """Ink of one sketch: float [64, 64] in [0, 1]."""
    points = np.array(rows, np.float32).reshape(-1, 3)
    image = drawing.draw(points, np.array([len(points)]), radius=radius)[0]
    assert image.shape == (64, 64)
    assert image.dtype == np.uint8
    return (255 - image.astype(float)) / 255


def test_a_horizontal_line_by_hand() -> None:
    ink = drawn((0, 0, 0), (1, 0, 1))
    # on the border of rows 31 and 32: radius .914, so both are full and the next ones have nothing left
    columns = slice(10, 54)
    np.testing.assert_allclose(ink[31:33, columns], 0.914, atol=0.05)
    assert ink[:30].max() == 0
    assert ink[34:].max() == 0
    # 58.5 px long with round caps: from 32 - 29.26 - .914 = 1.8 to 62.2
    lit = np.flatnonzero(ink[31] > 0.1)
    assert (lit[0], lit[-1]) == (2, 61)


@pytest.mark.parametrize("angle", [0.0, 0.3, 0.7854, 1.2, 2.5])
def test_a_line_has_the_ink_of_1_83_px_times_its_length(angle: float) -> None:
    x, y = np.cos(angle), np.sin(angle)
    ink = drawn((0, 0, 0), (x, y, 1))
    length = 64 * 256 / 280 / max(abs(x), abs(y))
    assert ink.sum() == pytest.approx(length * 1.83 + np.pi * 0.914**2, rel=0.09 if angle == 0.7854 else 0.025)


def test_ink_does_not_add_up_where_lines_overlap() -> None:
    once = drawn((0, 0, 0), (1, 1, 1))
    twice = drawn((0, 0, 0), (1, 1, 1), (1, 1, 0), (0, 0, 1))
    assert np.abs(once - twice).max() <= 1 / 8  # the discs of the way back lie a little elsewhere
    assert twice.max() <= 1


def test_pen_above_the_threshold_ends_a_stroke() -> None:
    joined = drawn((0, 0, 0), (0, 1, 0.8), (1, 1, 0), (1, 0, 1))
    apart = drawn((0, 0, 0), (0, 1, 0.81), (1, 1, 0), (1, 0, 1))
    middle = (slice(55, 64), slice(20, 44))
    assert joined[middle].max() > 0.9
    assert apart[middle].max() == 0
    assert apart.sum() < joined.sum()


def test_centred_and_independent_of_place_and_size() -> None:
    rows = np.array([(0, 0, 0), (0.3, 0.9, 0), (0.7, 0.2, 1), (0.1, 0.5, 0), (0.4, 0.4, 1)])
    plain = drawn(*rows)
    np.testing.assert_array_equal(plain, drawn(*(rows * [8, 8, 1] + [-64, 32, 0]), radius=8))
    ys, xs = np.nonzero(plain > 0.5)
    assert ys.min() + ys.max() == pytest.approx(63, abs=1)
    assert xs.min() + xs.max() == pytest.approx(63, abs=1)


def test_a_shrunken_sample_is_not_blown_up() -> None:
    full, half, tenth = (drawn((0, 0, 0), (size, 0, 1)).sum() for size in (1.0, 0.5, 0.1))
    assert half == pytest.approx(full, rel=1e-6)
    assert tenth == pytest.approx(58.5 / 5 * 1.83 + np.pi * 0.914**2, rel=0.05)


def test_dots_empty_sketches_and_bad_numbers() -> None:
    dot = drawn((3, 3, 1))
    assert dot.sum() == pytest.approx(np.pi * 0.914**2, rel=0.1)
    assert dot[:30].max() == 0
    assert drawn().sum() == 0
    wild = drawn((np.nan, np.inf, np.nan), (-np.inf, 1, 0), (1e30, -1e30, 0.9), (0, 0, np.inf))
    assert 0 < wild.sum() < 64 * 64
    points = np.array([(0, 0, 0), (1, 0, 1)], np.float32)
    images = drawing.draw(points, np.array([0, 2, 0]), radius=1)
    assert images[0].min() == images[2].min() == 255
    assert images[1].min() < 50


def test_each_sketch_is_drawn_as_if_it_were_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 40, 30)
    points = generator.normal(size=(lengths.sum(), 3)).astype(np.float32)
    together = drawing.draw(points, lengths, radius=1)
    monkeypatch.setattr(drawing, "_CHUNK_DISCS", 1000)
    np.testing.assert_array_equal(drawing.draw(points, lengths, radius=1), together)
    for image, rows in zip(together, np.split(points, np.cumsum(lengths)[:-1]), strict=True):
        np.testing.assert_array_equal(drawing.draw(rows, np.array([len(rows)]), radius=1)[0], image)


def test_ten_thousand_sketches_take_seconds() -> None:
    # 14,000 to 18,000 a second measured; an evaluation draws 10,000
    walk = np.cumsum(np.random.default_rng(0).normal(size=(2000, 80, 2)), axis=1)
    points = np.concatenate([walk, np.zeros((2000, 80, 1))], axis=2).reshape(-1, 3).astype(np.float32)
    began = time.process_time()
    drawing.draw(points, np.full(2000, 80), radius=10)
    assert time.process_time() - began < 4
