"""Raw strokes to the sequences that ChiroDiff trains on (PAPER: ChiroDiff, data), for all sketches of a chunk at once.

Strokes of a chunk lie in one flat array, so the work is a dozen numpy calls however many sketches there are: the
11,458 sketches of KanjiVG take half a second on one core; sketch by sketch it takes five.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

SCALE = 10.0  # coordinates are multiplied by this last, so that they are of the size of the noise
POINT_LIMIT = 300  # sketches of this many points or more are dropped

COORDINATE_LIMIT = 1e9  # raw coordinates; beyond it sums and squares lose their meaning

Drawing = Sequence[NDArray[np.float64]]  # one sketch: strokes [n, 2], y downwards


@dataclasses.dataclass(frozen=True)
class Strokes:
    """Raw sketches, flat. Any unit and origin, y downwards.

    points: float64 [P, 2]; points_per_stroke: int64 [S]; strokes_per_sketch: int64 [N]
    """

    points: NDArray[np.float64]
    points_per_stroke: NDArray[np.int64]
    strokes_per_sketch: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.strokes_per_sketch)

    @classmethod
    def of(cls, drawings: Iterable[Drawing]) -> Strokes:
        """From lists of strokes."""
        strokes: list[NDArray[np.float64]] = []
        per_sketch = []
        for drawing in drawings:
            per_sketch.append(len(drawing))
            strokes.extend(drawing)
        points = np.concatenate(strokes) if strokes else np.zeros((0, 2))
        per_stroke = np.array([len(stroke) for stroke in strokes], np.int64)
        return cls(np.asarray(points, np.float64), per_stroke, np.array(per_sketch, np.int64))


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Prepared sketches, flat.

    points: float32 [P, 3]: x, y (first point at 0 and left out, the farthest drawn at SCALE), pen 1 on a stroke's last
    lengths: int64 [N]
    """

    points: NDArray[np.float32]
    lengths: NDArray[np.int64]


def chunks(drawings: Iterable[Drawing], size: int = 4096) -> Iterator[Strokes]:
    """Flat chunks of a stream of sketches, so that a large set never lies in memory as lists."""
    held: list[Drawing] = []
    for drawing in drawings:
        held.append(drawing)
        if len(held) == size:
            yield Strokes.of(held)
            held = []
    if held:
        yield Strokes.of(held)


def normalise(raw: Strokes, *, spacing: float, point_limit: int = POINT_LIMIT) -> Sequences:
    """Drop one-point strokes; first point at 0; divide by the largest distance from it; resample each stroke to
    max(2, int(length / spacing)) equidistant points; drop sketches of `point_limit` points or more; scale by SCALE.

    The first point, always at 0, is left out of the sequence, as in the original: only so does KanjiVG come out at
    the published mean of 88.6 points (and at most 165). It still counts towards `point_limit`.
    Points that resampling cuts off are not made up for: the original divides once more, by the largest distance left.
    A sketch without extent (no stroke of two points, or all points equal) is dropped. spacing is in units of the
    farthest point's distance. Coordinates must be `are_coordinates`: the readers see to it.
    """
    strokes = _without_dots(raw)
    if not len(strokes):
        return concatenate([])
    points, has_extent = _to_unit_disc(strokes)
    resampled, counts = _resample(points, strokes.points_per_stroke, spacing)

    stroke_starts = _starts(strokes.strokes_per_sketch)
    totals = np.add.reduceat(counts, stroke_starts)
    pen = np.zeros(len(resampled), np.float32)
    pen[np.cumsum(counts) - 1] = 1
    rows = np.column_stack([resampled * SCALE, pen]).astype(np.float32)

    good = has_extent & (totals < point_limit)
    keep = np.repeat(good, totals)
    keep[_starts(totals)] = False
    return Sequences(rows[keep], (totals - 1)[good])


def are_coordinates(numbers: NDArray[Any]) -> bool:
    """Whether all are numbers, finite and below COORDINATE_LIMIT."""
    return numbers.dtype.kind in "iuf" and bool((np.abs(numbers) < COORDINATE_LIMIT).all())


def _starts(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.cumsum(counts) - counts


def _without_dots(raw: Strokes) -> Strokes:
    """Without one-point and empty strokes, and without the sketches that have no other."""
    long = raw.points_per_stroke > 1
    sketch_of_stroke = np.repeat(np.arange(len(raw)), raw.strokes_per_sketch)[long]
    _, per_sketch = np.unique(sketch_of_stroke, return_counts=True)
    points = raw.points[np.repeat(long, raw.points_per_stroke)]
    return Strokes(points, raw.points_per_stroke[long], per_sketch.astype(np.int64))


def _to_unit_disc(strokes: Strokes) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Points [P, 2] with each sketch's first at 0 and farthest at distance 1; and which sketches [N] have extent."""
    points_per_sketch = np.add.reduceat(strokes.points_per_stroke, _starts(strokes.strokes_per_sketch))
    starts = _starts(points_per_sketch)
    points = strokes.points - np.repeat(strokes.points[starts], points_per_sketch, axis=0)
    radius = np.maximum.reduceat(np.hypot(points[:, 0], points[:, 1]), starts)
    has_extent = radius > 0
    return points / np.repeat(np.where(has_extent, radius, 1), points_per_sketch)[:, None], has_extent


def _resample(
    points: NDArray[np.float64], points_per_stroke: NDArray[np.int64], spacing: float
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Equidistant points along each stroke, its ends kept; returns points [Q, 2] and the number per stroke [S].

    All strokes are laid end to end on one axis of arc length with a gap of 1 between them, so one interpolation does.
    """
    starts = _starts(points_per_stroke)
    steps = np.zeros(len(points))
    steps[1:] = np.hypot(*np.diff(points, axis=0).T)
    steps[starts] = 0
    lengths = np.add.reduceat(steps, starts)
    # A hair more, so that a length of whole spacings has that many points whatever way its sum was rounded.
    counts = np.maximum(2, (lengths / spacing + 1e-9).astype(np.int64))

    steps[starts[1:]] = 1
    axis = np.cumsum(steps)
    first = axis[starts]
    position = np.arange(counts.sum()) - np.repeat(_starts(counts), counts)
    where = np.repeat(first, counts) + position * np.repeat(lengths / (counts - 1), counts)
    resampled = np.column_stack([np.interp(where, axis, points[:, 0]), np.interp(where, axis, points[:, 1])])
    # The last position may round to a hair beyond the stroke, into the gap: ends are copied, not interpolated.
    resampled[np.cumsum(counts) - 1] = points[np.cumsum(points_per_stroke) - 1]
    return resampled, counts


def concatenate(parts: Sequence[Sequences]) -> Sequences:
    """The sequences of several chunks end to end; none for no chunk."""
    together = [Sequences(np.zeros((0, 3), np.float32), np.zeros(0, np.int64)), *parts]
    points = np.concatenate([part.points for part in together])
    return Sequences(points, np.concatenate([part.lengths for part in together]))


def reorder(sequences: Sequences, order: NDArray[np.int64]) -> Sequences:
    """The same sketches in another order: the i-th is the former order[i]-th."""
    lengths = sequences.lengths[order]
    starts = _starts(sequences.lengths)[order]
    rows = np.arange(lengths.sum()) + np.repeat(starts - _starts(lengths), lengths)
    return Sequences(sequences.points[rows], lengths)
