"""Imagenette: ten easy classes of ImageNet, with their own training and validation pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from raysparse.data import class_folders, prepared, sources, stores
from raysparse.data.image import ImageOptions, Resize
from raysparse.data.listing import Listing
from raysparse.data.sketch import Download, Spec
from raysparse.errors import UsageError

_PLACE = "https://s3.amazonaws.com/fast-ai-imageclas/"
# fast.ai publishes MD5 sums, no others.
_FILES = {
    "full": Download("imagenette2.tgz", _PLACE + "imagenette2.tgz", None, "fe2fc210e6bb7c5664d602c3cd71e612"),
    "320px": Download("imagenette2-320.tgz", _PLACE + "imagenette2-320.tgz", None, "3df6f0d01a2c9592104656642f5e78a3"),
    "160px": Download("imagenette2-160.tgz", _PLACE + "imagenette2-160.tgz", None, "e793b78cc4c9e9a4ccc0c1155377a412"),
}

SPEC = Spec(
    name="imagenette",
    title="Imagenette 2: ten classes of ImageNet",
    licence="Apache 2.0 for the selection; the pictures are ImageNet's, for non-commercial research",
    citation="J. Howard, Imagenette, https://github.com/fastai/imagenette",
    source="the unpacked folder imagenette2 (or -320, -160) with train/ and val/ by class, or its .tgz",
    splits={
        "train": "the folder train/: 9,469 pictures",
        "validation": "the folder val/: 3,925 pictures",
        "reference": "the training pictures, or the first `reference_examples` of them",
    },
    downloads=tuple(_FILES.values()),
    kind="image",
)

CLASSES = (
    "n01440764", "n02102040", "n02979186", "n03000684", "n03028079",
    "n03394916", "n03417042", "n03425413", "n03445777", "n03888257",
)  # fmt: skip  # tench, English springer, cassette player, chain saw, church, French horn, garbage truck, ...


class Options(ImageOptions):
    resize: Resize = "centre"
    train_examples: int | None = Field(9_469, ge=1)
    validation_examples: int | None = Field(3_925, ge=1)
    # What to download; for 256 px the 320 px pictures (340 MB instead of 1.5 GB) lose nothing.
    variant: Literal["full", "320px", "160px"] = "320px"


def find(options: Options, *, source: Path | None, root: Path, progress: prepared.Progress | None = None) -> Listing:
    """The pictures of train/ and val/. UsageError where a class is missing, and for fewer than asked for."""
    if source is None:
        source = sources.downloaded(_FILES[options.variant], root, progress)
    folder = stores.unpacked(source, root) if stores.is_tar(source) else source
    inner = [folder, *(place for place in sorted(folder.glob("imagenette2*")) if place.is_dir())]
    chosen = next((place for place in inner if (place / "train").is_dir() and (place / "val").is_dir()), None)
    if chosen is None:
        raise UsageError(f"{source} has no folders train/ and val/; imagenette expects {SPEC.source}")
    return class_folders.halves(chosen, "train", "val", options, root, SPEC.source, CLASSES, progress=progress)


def tiny_source(folder: Path) -> Path:
    """Write a few made-up pictures in this layout; returns the source."""
    for split, count in (("train", 2), ("val", 1)):
        class_folders.draw_tiny(folder / split, CLASSES, count, size_px=160)
    return folder
