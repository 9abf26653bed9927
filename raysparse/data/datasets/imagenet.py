"""ImageNet-1k: class folders by WordNet id, from the folder that its holder has."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field

from raysparse.data import class_folders, prepared
from raysparse.data.image import ImageOptions, Resize
from raysparse.data.listing import Listing
from raysparse.data.sketch import Spec
from raysparse.errors import UsageError

SPEC = Spec(
    name="imagenet",
    title="ImageNet-1k (ILSVRC 2012)",
    licence="ImageNet's terms: non-commercial research and education",
    citation="O. Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, IJCV 2015",
    source="a folder with train/<wnid>/ and val/, by class too if conditional (or ILSVRC/Data/CLS-LOC above them)",
    splits={
        "train": "the folder train/: 1,281,167 pictures",
        "validation": "the folder val/: 50,000 pictures",
        "reference": "the training pictures, or the first `reference_examples` of them, which is advised here",
    },
    kind="image",
)

_WNID = re.compile(r"n\d{8}")


class Options(ImageOptions):
    resize: Resize = "centre"
    train_examples: int | None = Field(1_281_167, ge=1)
    validation_examples: int | None = Field(50_000, ge=1)
    classes: int = Field(1000, ge=1)  # class folders that train/ must have; class ids are their sorted order


def find(options: Options, *, source: Path | None, root: Path, progress: prepared.Progress | None = None) -> Listing:
    """The pictures of train/ and val/. UsageError for another number of classes, and for fewer than asked for."""
    if source is None:
        raise UsageError(f"imagenet needs its holder's consent and is not downloaded; give --path with {SPEC.source}")
    places = (source, source / "ILSVRC" / "Data" / "CLS-LOC", source / "Data" / "CLS-LOC")
    chosen = next((place for place in places if (place / "train").is_dir() and (place / "val").is_dir()), None)
    if chosen is None:
        raise UsageError(f"{source} has no folders train/ and val/; imagenet expects {SPEC.source}")
    wnids = sorted(place.name for place in (chosen / "train").iterdir() if _WNID.fullmatch(place.name))
    whole = len(wnids) == options.classes and all((chosen / "val" / wnid).is_dir() for wnid in wnids)
    if not (options.conditional or whole):
        return class_folders.halves(chosen, "train", "val", options, root, SPEC.source, progress=progress)
    # With its classes also where the model is not told: then both kinds of models share the encoded shards.
    if len(wnids) != options.classes:
        raise UsageError(
            f"{chosen / 'train'} has {len(wnids)} folders named by a WordNet id, not {options.classes}; get the whole "
            "data set, or set the option classes"
        )
    return class_folders.halves(chosen, "train", "val", options, root, SPEC.source, wnids, progress=progress)


def tiny_source(folder: Path) -> Path:
    """Write a few made-up pictures in this layout; returns the source."""
    for split, count in (("train", 10), ("val", 4)):
        class_folders.draw_tiny(folder / split, ("n01440764", "n02102040"), count, size_px=270)
    return folder
