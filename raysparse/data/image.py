"""Data sets of pictures: what one lets choose (ImageOptions), what encodes it (Encoder), and what the trainer and the
metrics get: Pictures (x are pixels) and Latents (x are what a first stage made of them, encoded once)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from raysparse.data import decoding
from raysparse.data.table import Table
from raysparse.errors import UsageError
from raysparse.section import Section

if TYPE_CHECKING:
    import torch

Resize = Literal["none", "centre", "celeba"]
Filter = Literal["bicubic", "lanczos", "bilinear", "box"]
Decode = Callable[["torch.Tensor"], "torch.Tensor"]
Same = TypeVar("Same", bound="_Examples")


class ImageOptions(Section):
    """What every data set of pictures lets one choose."""

    size_px: int = Field(256, ge=1, le=4096)  # side of the square pictures
    # "none": the pictures must have this size already. "centre": the largest centred square, then resized, as Latent
    # Diffusion does with LSUN. "celeba": 128 x 128 around (89, 121) of an aligned 178 x 218 CelebA picture, then
    # resized, as DDIM, U-ViT and SparseDM do.
    resize: Resize = "none"
    filter: Filter = "bicubic"  # of the resize, antialiased; Latent Diffusion's default is bicubic
    flips: bool = False  # each training picture is mirrored left to right with p = .5
    conditional: bool = False  # give the class to the model
    train_examples: int | None = Field(None, ge=1)  # None: all but the validation pictures
    validation_examples: int | None = Field(None, ge=1)  # None: a tenth of all, at most 2,500, or the set's own split
    # What FID compares with: the first so many of the training pictures, whose order is a fixed shuffle. None: all of
    # them (PAPER: Latent Diffusion compares with the whole training set).
    reference_examples: int | None = Field(None, ge=1)


class Encoder(Protocol):
    """A first stage's encoder, picklable: it goes to the processes that encode."""

    @property
    def identity(self) -> str:
        """Hash of architecture and weights: latents of another identity are not the same data."""

    def latent_shape(self, size_px: int) -> tuple[int, int, int]:
        """(c, h, w) of the latent of a square picture."""

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        """float16 [B, c, h, w] on the CPU, of uint8 [B, 3, H, W]."""


def to_pixels(x: torch.Tensor) -> torch.Tensor:
    """Values around [-1, 1] as 0 ... 255, rounded: uint8 like x, on its device. What is not finite counts as 0, so a
    diverged model gives gray pictures and no error."""
    import torch

    values = x.detach().float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return ((values + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@dataclasses.dataclass(frozen=True)
class _Examples:
    """Rows 0 ... count - 1 of a table, which is memory-mapped.

    labels: int64 [N] in [0, num_classes), or None; flips: the recipe mirrors these examples with p = .5
    content_hash: of x and labels; images_hash: of the pictures alone, equal for equal pictures whatever x is
    """

    table: Table
    count: int
    size_px: int
    labels: NDArray[np.int64] | None
    num_classes: int
    flips: bool
    content_hash: str
    images_hash: str

    def __len__(self) -> int:
        return self.count

    @property
    def value_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of x."""
        raise NotImplementedError

    def first(self: Same, count: int) -> Same:
        """The first so many examples."""
        if count >= self.count:
            return self
        return dataclasses.replace(
            self,
            count=count,
            labels=None if self.labels is None else self.labels[:count],
            content_hash=f"{self.content_hash}-first{count}",
            images_hash=f"{self.images_hash}-first{count}",
        )

    def batch(self, indices: ArrayLike, flips: ArrayLike | None = None) -> dict[str, Any]:
        """x: float32 [B, C, H, W]; cond: {} or {"labels": int64 [B]}. indices: int64 [B] in [0, N), else IndexError.

        flips: bool [B], True where x is to be of the mirrored picture; None: nowhere. Needs torch.
        """
        import torch

        chosen = self._inside(indices)
        mirrored = np.zeros(len(chosen), bool) if flips is None else np.asarray(flips, bool)
        if mirrored.shape != chosen.shape:
            raise ValueError(f"flips must be one bool per example, got shape {mirrored.shape} for {len(chosen)}")
        cond = {} if self.labels is None else {"labels": torch.from_numpy(self.labels[chosen])}
        return {"x": self._values(chosen, mirrored), "cond": cond}

    def _values(self, chosen: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> torch.Tensor:
        raise NotImplementedError

    def draw_conditions(
        self, n: int, generator: np.random.Generator
    ) -> tuple[tuple[int, int, int, int], dict[str, torch.Tensor]]:
        """What n samples are to be: the shape (n, C, H, W) of their noise, and cond as in `batch`, the labels those of
        examples drawn with replacement."""
        import torch

        chosen = generator.integers(0, len(self), n)
        cond = {} if self.labels is None else {"labels": torch.from_numpy(self.labels[chosen])}
        return (n, *self.value_shape), cond

    def _inside(self, indices: ArrayLike) -> NDArray[np.int64]:
        chosen = np.asarray(indices, np.int64)
        if len(chosen) and not (chosen.min() >= 0 and chosen.max() < self.count):
            raise IndexError(f"examples are 0 to {self.count - 1}, got {chosen.min()} to {chosen.max()}")
        return chosen


@dataclasses.dataclass(frozen=True)
class Pictures(_Examples):
    """Pictures as pixels: x in [-1, 1], C = 3. A reference split is this too when the others are Latents."""

    @property
    def value_shape(self) -> tuple[int, int, int]:
        return 3, self.size_px, self.size_px

    def images(self, indices: ArrayLike) -> torch.Tensor:
        """The real pictures: uint8 [B, 3, H, W]."""
        import torch

        return torch.from_numpy(self._pixels(self._inside(indices)))

    def to_images(self, x: torch.Tensor, cond: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Samples as pictures: uint8 [B, 3, H, W] on the CPU. x: float [B, 3, H, W] as from the model, any device.

        Values that are not finite count as 0, so a diverged model gives gray pictures and no error.
        """
        return to_pixels(x).cpu()

    def _pixels(self, chosen: NDArray[np.int64]) -> NDArray[np.uint8]:
        if "png" not in self.table.columns:
            return self.table.gather("pixels", chosen)
        found = [decoding.pixels(decoding.decode(self.table.blob("png", int(row)))) for row in chosen]
        return np.stack(found) if found else np.empty((0, *self.value_shape), np.uint8)

    def _values(self, chosen: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> torch.Tensor:
        import torch

        values = self._pixels(chosen)
        values[mirrored] = values[mirrored][..., ::-1]
        return torch.from_numpy(values).float().div_(127.5).sub_(1)


@dataclasses.dataclass(frozen=True)
class Latents(_Examples):
    """What a first stage made of the pictures: x are its latents, stored as float16, read as float32.

    Where the recipe flips, the latent of the mirrored picture is stored too: an encoder does not commute with a
    mirror, so a mirrored latent would not be the mirrored picture's.
    decode: from x to uint8 pictures, put in by train/setup
    """

    decode: Decode | None = None

    @property
    def value_shape(self) -> tuple[int, int, int]:
        c, h, w = self.table.shape("latent")
        return c, h, w

    def images(self, indices: ArrayLike) -> torch.Tensor:
        """UsageError: the pictures of this split were not kept."""
        raise UsageError("this split holds latents, its pictures were not kept; split 'reference' has pictures")

    def to_images(self, x: torch.Tensor, cond: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Samples decoded: uint8 [B, 3, H, W]. UsageError where there is no decoder."""
        if self.decode is None:
            raise UsageError(
                "latents need a first stage to become pictures; give `first_stage` in the trial's settings"
            )
        return self.decode(x)

    def _values(self, chosen: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> torch.Tensor:
        import torch

        if mirrored.any() and "latent_flipped" not in self.table.columns:
            raise UsageError("latents of mirrored pictures were not prepared; set the data set's option flips: true")
        values = torch.empty((len(chosen), *self.value_shape))
        for flipped, column in ((False, "latent"), (True, "latent_flipped")):
            places = np.flatnonzero(mirrored == flipped)
            if len(places):
                stored = torch.from_numpy(self.table.gather(column, chosen[places]))
                # One by one: a latent is below the size from which torch hands work to its threads, whose start costs
                # more than a copy. On a busy machine a whole batch at once made an epoch take 2 s instead of .1.
                for place, latent in zip(places.tolist(), stored, strict=True):
                    values[place].copy_(latent)
        return values
