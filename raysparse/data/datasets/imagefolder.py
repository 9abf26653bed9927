"""Any folder of pictures, with or without a folder per class, with or without train/ and val/."""

from __future__ import annotations

from pathlib import Path

from raysparse.data import class_folders, prepared
from raysparse.data.image import ImageOptions
from raysparse.data.listing import Listing
from raysparse.data.sketch import Spec
from raysparse.errors import UsageError

SPEC = Spec(
    name="imagefolder",
    title="A folder of pictures",
    licence="that of the pictures",
    citation="none",
    source="a folder of .png, .jpg, .jpeg, .webp or .bmp, at any depth; with `conditional` a folder per class",
    splits={
        "train": "the folder train/, or all but the validation pictures",
        "validation": "the folder val/, valid/, validation/ or test/, or `validation_examples` by a fixed shuffle",
        "reference": "the first `reference_examples` training pictures of a fixed shuffle; all of them by default",
    },
    kind="image",
)


class Options(ImageOptions):
    pass


def find(options: Options, *, source: Path | None, root: Path, progress: prepared.Progress | None = None) -> Listing:
    """The pictures of a folder. UsageError for one without pictures, for fewer than asked for, and with `conditional`
    for a picture outside a class' folder or a class without pictures."""
    if source is None:
        raise UsageError(f"imagefolder needs --path (data.source): {SPEC.source}")
    folders = class_folders.split_folders(source)
    if folders is None:
        return class_folders.whole(source, options, root, SPEC.source, progress)
    train, validation = folders
    return class_folders.halves(source, train, validation, options, root, SPEC.source, progress=progress)


def tiny_source(folder: Path) -> Path:
    """Write a few made-up pictures in two classes; returns the source."""
    return class_folders.draw_tiny(folder, ("circles", "squares"), 12, size_px=256)
