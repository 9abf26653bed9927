"""The embedded set of pictures: the glyphs of `hershey` in colour, so that the image half runs without a download.

Every glyph is drawn under the jitters of `hershey` (three for training, one for validation, two for the reference); its
ink and its ground have colours of their own, so that a model has shapes and three channels to learn.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from raysparse import rng
from raysparse.data import listing, prepared
from raysparse.data.datasets import hershey
from raysparse.data.image import ImageOptions
from raysparse.data.listing import Entries, Listing
from raysparse.data.preprocess import Drawing
from raysparse.data.sketch import Spec
from raysparse.errors import UsageError

SPEC = Spec(
    name="hershey_pictures",
    title="Glyphs of the Hershey fonts drawn as small pictures, with jitter",
    licence=hershey.SPEC.licence,
    citation=hershey.SPEC.citation,
    source="nothing: the glyphs come with the package Hershey-Fonts",
    splits=hershey.SPEC.splits,
    kind="image",
)

RENDERING = 1  # raise it when the same glyph would be drawn otherwise
_BORDER = 0.1  # of the side, on each side of the glyph
_LINE = 0.055  # of the side: 1.8 px at 32


class Options(ImageOptions):
    size_px: int = Field(32, ge=8, le=512)


def find(options: Options, *, source: Path | None, root: Path, progress: prepared.Progress | None = None) -> Listing:
    """The glyphs, shuffled. They are embedded, so a source is an error."""
    if source is not None:
        raise UsageError(f"hershey_pictures is embedded and reads no file; leave out the path {source}")
    if options.conditional:
        raise UsageError("hershey_pictures has no classes; set conditional: false")
    version = importlib.metadata.version("Hershey-Fonts")
    wanted = {"train": options.train_examples, "validation": options.validation_examples}
    wanted["reference"] = options.reference_examples
    splits, first = {}, 0
    for name, draws in hershey.DRAWS.items():
        keys = [(draw, glyph) for draw in range(first, first + draws) for glyph in range(len(_glyphs()))]
        chosen = listing.limited(len(keys), wanted[name], f"hershey_pictures, {name}", f"{name}_examples")
        picked = [keys[i] for i in chosen]
        splits[name] = Entries(picked, [f"glyph {glyph}, draw {draw}" for draw, glyph in picked])
        first += draws
    return Listing(
        Glyphs(options.size_px),
        splits["train"],
        splits["validation"],
        splits["reference"],
        source_hash=f"Hershey-Fonts {version}, rendering {RENDERING}",
        facts={"glyphs": len(_glyphs())},
    )


@dataclasses.dataclass(frozen=True)
class Glyphs:
    """Draws glyphs; keys are (draw of the jitter, number of the glyph)."""

    size_px: int

    def read(self, keys: Sequence[tuple[int, int]]) -> Iterator[NDArray[np.uint8]]:
        return (draw_glyph(_jittered(draw)[glyph], glyph, self.size_px) for draw, glyph in keys)


@functools.cache
def _glyphs() -> list[Drawing]:
    return hershey.glyphs()


@functools.cache
def _jittered(draw: int) -> list[Drawing]:
    """Every glyph under the affine map that `hershey` gives it in this draw."""
    return hershey.jittered_drawings(_glyphs(), draw)


def draw_glyph(drawing: Drawing, number: int, side: int) -> NDArray[np.uint8]:
    """uint8 [side, side, 3]. A pixel's ink is its share inside the line: radius + .5 - distance, in [0, 1]."""
    points = np.concatenate(drawing)
    low, high = points.min(axis=0), points.max(axis=0)
    scale = side * (1 - 2 * _BORDER) / max(float((high - low).max()), 1e-9)
    placed = [((stroke - (low + high) / 2) * scale + side / 2).astype(np.float32) for stroke in drawing]
    starts, ends = (np.concatenate([stroke[part] for stroke in placed]) for part in (slice(None, -1), slice(1, None)))
    distance = np.sqrt(_nearest(starts, ends - starts, side))
    ink = np.clip(max(_LINE * side, 1.2) / 2 + 0.5 - distance, 0, 1)[..., None]
    ground_colour, ink_colour = _colours(number)
    return np.rint(ground_colour + ink * (ink_colour - ground_colour)).astype(np.uint8)


def _nearest(starts: NDArray[np.float32], along: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """Squared distance from each pixel's middle to the nearest segment: [side, side]."""
    middles = np.arange(side, dtype=np.float32) + np.float32(0.5)
    nearest = np.full((side, side), np.inf, np.float32)
    at_once = max(1, 2**18 // side**2)  # 1 MB an array, which the caches hold
    for first in range(0, len(starts), at_once):
        part = slice(first, first + at_once)
        dx, dy = along[part, 0, None, None], along[part, 1, None, None]
        x, y = middles[None, None] - starts[part, 0, None, None], middles[None, :, None] - starts[part, 1, None, None]
        t = np.clip((x * dx + y * dy) / np.maximum(dx * dx + dy * dy, np.float32(1e-12)), 0, 1)
        nearest = np.minimum(nearest, ((x - t * dx) ** 2 + (y - t * dy) ** 2).min(axis=0))
    return nearest


def _colours(number: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of a glyph: a light ground and a dark ink."""
    generator = rng.numpy_generator(hershey.SEED, "hershey colours", step=number)
    return generator.uniform(170, 255, 3), generator.uniform(0, 110, 3)


def tiny_source(folder: Path) -> None:
    """None: the data set needs no source."""
