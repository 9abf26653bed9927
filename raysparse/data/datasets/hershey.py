"""The embedded data set: stroke glyphs of the Hershey fonts, so that a sweep runs without a download.

About 1,240 different glyphs (Latin, Greek, Cyrillic, Japanese, gothic, symbols) are each drawn six times, every time
with another small affine jitter: three for training, two for the reference and one for validation. The three splits
are draws from the same distribution, so FID(validation, reference) is what a perfect model would get.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raysparse import rng
from raysparse.data import prepared
from raysparse.data.preprocess import Drawing, Strokes, concatenate, normalise, reorder
from raysparse.data.sketch import SketchOptions, Spacing, Spec
from raysparse.errors import UsageError

SPEC = Spec(
    name="hershey",
    title="Stroke glyphs of the Hershey fonts, with jitter",
    licence="Glyphs by A. V. Hershey (1967), free to use with acknowledgement; package Hershey-Fonts under MIT",
    citation="A. V. Hershey, Calligraphy for Computers, U.S. Naval Weapons Laboratory, 1967",
    source="nothing: the glyphs come with the package Hershey-Fonts",
    splits={
        "train": "every glyph, 3 draws of the jitter",
        "validation": "every glyph, 1 other draw",
        "reference": "every glyph, 2 other draws",
    },
)

DRAWS = {"train": 3, "validation": 1, "reference": 2}
ROTATION = 0.12  # radians, uniform in +-
STRETCH = 0.12  # logarithm of each axis' factor, uniform in +-; preprocessing takes their common part out again
SHEAR = 0.15  # x moved by this share of y, uniform in +-
SEED = 0  # fixed: the data set is the same everywhere


class Options(SketchOptions):
    # Twice the paper's spacing: 40 points a sketch instead of 83, so a sweep of it takes minutes.
    spacing: Spacing = 0.1


def prepare(options: Options, *, source: Path | None, root: Path, progress: prepared.Progress | None = None) -> Path:
    """Prepared folder. The glyphs are embedded, so a source is an error."""
    if source is not None:
        raise UsageError(f"hershey is embedded and reads no file; leave out the path {source}")
    version = importlib.metadata.version("Hershey-Fonts")
    return prepared.build(
        SPEC, options, source_hash=f"Hershey-Fonts {version}", root=root, make=lambda: _make(options, progress)
    )


def _make(options: Options, progress: prepared.Progress | None) -> prepared.Contents:
    drawings = glyphs()
    parts, splits, start, draw = [], {}, 0, 0
    for split, draws in DRAWS.items():
        raw = [_jittered(drawings, draw + i) for i in range(draws)]
        sequences = concatenate([normalise(r, spacing=options.spacing, point_limit=options.point_limit) for r in raw])
        count = len(sequences.lengths)
        # Shuffled, so that the first so many examples of a split are a fair sample of it.
        parts.append(reorder(sequences, rng.numpy_generator(SEED, "hershey order", step=draw).permutation(count)))
        splits[split] = range(start, start + count)
        start, draw = start + count, draw + draws
        if progress:
            progress(draw, sum(DRAWS.values()))
    whole = concatenate(parts)
    return prepared.Contents(whole.points, whole.lengths, splits, facts={"glyphs": len(drawings)})


def glyphs() -> list[Drawing]:
    """All different glyphs that have a line: strokes float64 [n, 2], y downwards. The fonts share many."""
    from HersheyFonts import HersheyFonts

    font = HersheyFonts()
    found: dict[tuple[bytes, ...], Drawing] = {}
    for name in sorted(font.default_font_names):
        font.load_default_font(name)
        for glyph in font.all_glyphs.values():
            strokes = [np.array(stroke, np.float64) for stroke in glyph.strokes if len(stroke) > 1]
            if strokes:
                strokes = [stroke - strokes[0][0] for stroke in strokes]
                found.setdefault(tuple(stroke.tobytes() for stroke in strokes), strokes)
    return list(found.values())


def _jittered(drawings: list[Drawing], draw: int) -> Strokes:
    """Every glyph under an affine map of its own."""
    generator = rng.numpy_generator(SEED, "hershey jitter", step=draw)
    raw = Strokes.of(drawings)
    points_per_sketch = [sum(map(len, drawing)) for drawing in drawings]
    maps = np.repeat(_affine(len(drawings), generator), points_per_sketch, axis=0)
    return Strokes(np.einsum("pij,pj->pi", maps, raw.points), raw.points_per_stroke, raw.strokes_per_sketch)


def jittered_drawings(drawings: list[Drawing], draw: int) -> list[Drawing]:
    """The same maps, applied to glyphs that stay apart: strokes float64 [n, 2] of each."""
    maps = _affine(len(drawings), rng.numpy_generator(SEED, "hershey jitter", step=draw))
    return [[stroke @ matrix.T for stroke in drawing] for drawing, matrix in zip(drawings, maps, strict=True)]


def _affine(n: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Random maps [n, 2, 2]: stretch and shear, then rotation."""
    angle = generator.uniform(-ROTATION, ROTATION, n)
    stretch = np.exp(generator.uniform(-STRETCH, STRETCH, (n, 2)))
    shear = generator.uniform(-SHEAR, SHEAR, n)
    deform = np.zeros((n, 2, 2))
    deform[:, 0, 0], deform[:, 1, 1], deform[:, 0, 1] = stretch[:, 0], stretch[:, 1], shear
    rotate = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], axis=1).reshape(n, 2, 2)
    return rotate @ deform


def tiny_source(folder: Path) -> None:
    """None: the data set needs no source."""
