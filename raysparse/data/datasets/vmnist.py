"""VMNIST: handwritten digits as strokes, a folder per digit with a pickle per sketch.

A pickle holds {'drawing': [stroke, ...]}, a stroke being [x, y] or [x, y, t] with lists or arrays of one length.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysparse.data import pickles, prepared, shuffled, sources, synthetic
from raysparse.data.preprocess import Drawing, are_coordinates
from raysparse.data.sketch import Spec
from raysparse.errors import UsageError

DIGITS = tuple("0123456789")

SPEC = Spec(
    name="vmnist",
    title="VMNIST: handwritten digits in strokes",
    licence="as its distributor says; MNIST itself is CC BY-SA 3.0",
    citation="A. Das et al., SketchODE, ICLR 2022",
    source="a folder with subfolders 0 to 9 of pickles {'drawing': [[x, y, t], ...]}",
    splits=shuffled.SPLITS,
    mean_points=55.7,  # what the test FLOPs of the paper's Table 2 imply
)


class Options(shuffled.ShuffledOptions):
    pass


def prepare(options: Options, *, source: Path | None, root: Path, progress: prepared.Progress | None = None) -> Path:
    """Prepared folder. source: the folder with the digits' subfolders; there is no public download."""
    if source is None:
        raise UsageError(f"vmnist has no public download; give --path with {SPEC.source}")
    lacking = [digit for digit in DIGITS if not (source / digit).is_dir()]
    if lacking:
        raise UsageError(f"{source} has no subfolder {', '.join(lacking)}; vmnist expects {SPEC.source}")
    paths = {digit: sorted(p for p in (source / digit).iterdir() if p.is_file()) for digit in DIGITS}
    everything = [path for digit in DIGITS for path in paths[digit]]
    return prepared.build(
        SPEC,
        options,
        source_hash=sources.content_hash(everything, root),
        root=root,
        make=lambda: _make(paths, options, progress),
    )


def _make(paths: dict[str, list[Path]], options: Options, progress: prepared.Progress | None) -> prepared.Contents:
    total, done = sum(map(len, paths.values())), 0

    def drawings(digit: str) -> Iterator[Drawing]:
        nonlocal done
        for path in paths[digit]:
            yield read(path)
            done += 1
            if progress and done % 500 == 0:
                progress(done, total)

    return shuffled.contents(((digit, drawings(digit)) for digit in DIGITS), options, {})


def read(path: Path) -> Drawing:
    """The strokes of one pickle: float64 [n, 2] each. UsageError naming the file for anything else."""
    value = pickles.load(path.read_bytes(), str(path))
    try:
        return [_stroke(stroke) for stroke in value["drawing"]]
    except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
        raise UsageError(
            f"{path}: not a sketch {{'drawing': [[x, y, t], ...]}} ({error}); get the file again"
        ) from error


def _stroke(stroke: Any) -> NDArray[np.float64]:
    if len(stroke) not in (2, 3):
        raise ValueError(f"a stroke has {len(stroke)} rows instead of x, y and perhaps t")
    points = np.array([stroke[0], stroke[1]], np.float64).T
    if points.ndim != 2 or not are_coordinates(points):
        raise ValueError("a stroke's x and y must be finite numbers")
    return points


def tiny_source(folder: Path) -> Path:
    """Write a few made-up drawings per digit in this format; returns the source."""
    for digit in DIGITS:
        (folder / digit).mkdir()
        for i, drawing in enumerate(synthetic.doodles(6, int(digit))):
            strokes = [[*stroke.T.tolist(), list(range(len(stroke)))] for stroke in drawing]
            (folder / digit / f"sketch_{i}").write_bytes(pickle.dumps({"drawing": strokes}))
    return folder
