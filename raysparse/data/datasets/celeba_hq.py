"""CelebA-HQ: 30,000 faces, from a folder of its pictures. Latent Diffusion does not mirror them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from raysparse.data import class_folders, prepared
from raysparse.data.image import ImageOptions, Resize
from raysparse.data.listing import Listing
from raysparse.data.sketch import Spec
from raysparse.errors import UsageError

SPEC = Spec(
    name="celeba_hq",
    title="CelebA-HQ: faces at 1024 px",
    licence="CelebA's: non-commercial research only",
    citation="T. Karras et al., Progressive Growing of GANs, ICLR 2018",
    source="a folder of the 30,000 pictures (png or jpg, 256 px or larger), as CelebAMask-HQ's CelebA-HQ-img",
    splits={
        "train": "12,500 pictures (25,000 with split: full), by a fixed shuffle of the sorted names",
        "validation": "500 others (5,000); which ones the paper took is unknown",
        "reference": "the training pictures, or the first `reference_examples` of them",
    },
    kind="image",
)

COUNTS = {"paper": (12_500, 500), "full": (25_000, 5_000)}


class Options(ImageOptions):
    resize: Resize = "centre"  # the pictures are square: nothing is cropped
    # How many training and validation pictures, unless they are given: the sparse paper's, or Latent Diffusion's own.
    split: Literal["paper", "full"] = "paper"


def find(options: Options, *, source: Path | None, root: Path, progress: prepared.Progress | None = None) -> Listing:
    """The pictures of the folder. UsageError for fewer than the split has, unless smaller counts are asked for."""
    if source is None:
        raise UsageError(f"celeba_hq has no public download without a form; give --path with {SPEC.source}")
    train, validation = COUNTS[options.split]
    counted = options.model_copy(
        update={
            "train_examples": options.train_examples or train,
            "validation_examples": options.validation_examples or validation,
        }
    )
    return class_folders.whole(source, counted, root, SPEC.source, progress)


def tiny_source(folder: Path) -> Path:
    """Write a few made-up pictures in this layout; returns the source."""
    return class_folders.draw_tiny(folder, (), 24, size_px=300)
