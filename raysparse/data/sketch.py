"""Sketch data sets: what one declares (Spec, SketchOptions) and what the trainer and the metrics get (Examples)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from raysparse.data import drawing
from raysparse.data.preprocess import POINT_LIMIT, SCALE
from raysparse.section import Section

if TYPE_CHECKING:
    import torch

Representation = Literal["abs", "del"]
# In units of the farthest point's distance from the first; .001 makes thousands of points of a sketch
Spacing = Annotated[float, Field(ge=1e-3, le=1)]


@dataclasses.dataclass(frozen=True)
class Download:
    """A file that a data set can get for itself."""

    name: str  # the file's name
    url: str
    sha256: str | None  # None: nobody publishes one; what was got is recorded in the manifest
    md5: str | None = None  # where its authors publish only that


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a data set is: shown by the command line, kept in the manifest."""

    name: str  # the file name of its plugin
    title: str
    licence: str
    citation: str
    source: str  # what `--path` expects, in words
    splits: Mapping[str, str]  # what train, validation and reference hold, in words
    downloads: tuple[Download, ...] = ()
    kind: str = "sketch"
    mean_points: float | None = None  # of a training sketch at spacing .05, for plans made before the data is at hand


class SketchOptions(Section):
    """What every sketch data set lets one choose."""

    # "abs": x, y; "del": differences to the point before. Which one the sparse paper used is unknown; the original's
    # code defaults to abs, its paper chooses del (PAPER: ChiroDiff).
    representation: Representation = "abs"
    spacing: Spacing = 0.05  # between the points of a stroke
    point_limit: int = Field(POINT_LIMIT, ge=3)  # sketches of this many points or more are dropped


@dataclasses.dataclass(frozen=True)
class Examples:
    """The examples of one split. `open_split` (prepared.py) makes them; the arrays are memory-mapped and read-only.

    points: float32 [P, 3] x, y absolute, the farthest of a drawing's own points at 10; pen 1 on a stroke's last point
    offsets: int64 [N + 1], example i is points[offsets[i] : offsets[i + 1]]
    labels: int64 [N] in [0, num_classes), or None
    content_hash: of the three arrays; the same for both representations, which hold the same sketches
    """

    points: NDArray[np.float32]
    offsets: NDArray[np.int64]
    labels: NDArray[np.int64] | None
    num_classes: int
    representation: Representation
    content_hash: str

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def images_hash(self) -> str:
        """Of what `images` draws: FIDs against references with equal hashes compare."""
        return f"{self.content_hash}-drawing{drawing.VERSION}"

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Points per sketch: int32 [N]."""
        return np.diff(self.offsets).astype(np.int32)

    def first(self, count: int) -> Examples:
        """The first so many examples."""
        if count >= len(self):
            return self
        labels = None if self.labels is None else self.labels[:count]
        content_hash = f"{self.content_hash}-first{count}"
        return dataclasses.replace(self, offsets=self.offsets[: count + 1], labels=labels, content_hash=content_hash)

    def batch(self, indices: ArrayLike) -> dict[str, Any]:
        """x: float32 [B, L, 3], zero beyond a sketch's length, L the longest of them; cond: dict of lengths int64 [B]
        and, in a set with classes, labels int64 [B]. indices: int64 [B], array or tensor. Needs torch."""
        import torch

        chosen = np.asarray(indices, np.int64)
        rows, lengths = self._rows(chosen)
        longest = int(lengths.max(initial=0))
        padded = np.zeros((len(chosen), longest, 3), np.float32)
        filled = np.arange(longest) < lengths[:, None]
        padded[filled] = self.points[rows]
        if self.representation == "del":
            padded[:, 1:, :2] -= padded[:, :-1, :2].copy()
            padded[~filled] = 0
        cond = {"lengths": torch.from_numpy(lengths)}
        if self.labels is not None:
            cond["labels"] = torch.from_numpy(self.labels[chosen])
        return {"x": torch.from_numpy(padded), "cond": cond}

    def images(self, indices: ArrayLike) -> torch.Tensor:
        """The real examples drawn: uint8 [B, 1, 64, 64], 255 is white."""
        chosen = np.asarray(indices, np.int64)
        rows, lengths = self._rows(chosen)
        return _drawn(self.points[rows], lengths)

    def to_images(self, x: torch.Tensor, cond: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Generated examples drawn by the same rule: uint8 [B, 1, 64, 64].

        x: float [B, L, 3] as from the model, any device; cond["lengths"]: int64 [B]. A pen above .8 ends a stroke.
        Values that are not finite count as 0, so a diverged model gives poor images and no error.
        """
        values = np.nan_to_num(x.detach().float().cpu().numpy(), posinf=0, neginf=0)
        lengths = np.clip(cond["lengths"].cpu().numpy().astype(np.int64), 0, values.shape[1])
        if self.representation == "del":
            values[..., :2] = np.cumsum(values[..., :2], axis=1, dtype=np.float64)
        return _drawn(values[np.arange(values.shape[1]) < lengths[:, None]], lengths)

    def draw_conditions(
        self, n: int, generator: np.random.Generator
    ) -> tuple[tuple[int, int, int], dict[str, torch.Tensor]]:
        """What n samples are to be: the shape (n, L, 3) of their noise and cond as in `batch`.

        Each takes the length (and the label) of an example drawn with replacement, so both are distributed as here.
        """
        import torch

        chosen = generator.integers(0, len(self), n)
        lengths = np.diff(self.offsets)[chosen]
        cond = {"lengths": torch.from_numpy(lengths)}
        if self.labels is not None:
            cond["labels"] = torch.from_numpy(self.labels[chosen])
        return (n, int(lengths.max(initial=0)), 3), cond

    def _rows(self, chosen: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows of `points` of the chosen examples, end to end, and how many each has."""
        starts = self.offsets[chosen]
        lengths = self.offsets[chosen + 1] - starts
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return np.repeat(starts, lengths) + within, lengths


def _drawn(points: NDArray[np.float32], lengths: NDArray[np.int64]) -> torch.Tensor:
    """Draw sequences, which leave out their first point: it is put back at 0. A sketch of no points is white."""
    import torch

    starts = (np.cumsum(lengths) - lengths)[lengths > 0]
    whole = np.insert(points, starts, 0, axis=0)
    images = drawing.draw(whole, lengths + (lengths > 0), radius=SCALE)
    return torch.from_numpy(images[:, None])
