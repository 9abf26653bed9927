"""CelebA at 64 px: the aligned faces, cropped as DDIM, U-ViT and SparseDM do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import Field

from raysparse.data import class_folders, listing, prepared
from raysparse.data.image import ImageOptions, Resize
from raysparse.data.listing import Entries, Folder, Listing
from raysparse.data.sketch import Spec
from raysparse.errors import UsageError

SPEC = Spec(
    name="celeba64",
    title="CelebA: aligned faces at 64 px",
    licence="non-commercial research only",
    citation="Z. Liu et al., Deep Learning Face Attributes in the Wild, ICCV 2015",
    source="the folder img_align_celeba of 202,599 pictures 178x218, 000001.jpg to 202599.jpg",
    splits={
        "train": "numbers 1 to 162,770, CelebA's own split; any order is a fixed shuffle",
        "validation": "numbers 162,771 to 182,637",
        "reference": "the training pictures, or the first `reference_examples` of them",
    },
    kind="image",
)

LAST_TRAIN, LAST_VALIDATION = 162_770, 182_637  # list_eval_partition.txt follows the numbers


class Options(ImageOptions):
    size_px: int = Field(64, ge=1, le=4096)
    resize: Resize = "celeba"
    flips: bool = True
    train_examples: int | None = Field(LAST_TRAIN, ge=1)
    validation_examples: int | None = Field(LAST_VALIDATION - LAST_TRAIN, ge=1)


def find(options: Options, *, source: Path | None, root: Path, progress: prepared.Progress | None = None) -> Listing:
    """The pictures of the folder, split by their numbers. UsageError for names that are none, and for too few."""
    if source is None:
        raise UsageError(f"celeba64 has no public download without a form; give --path with {SPEC.source}")
    if options.conditional:
        raise UsageError("celeba64 has no classes; set conditional: false")
    keys, others = listing.find(source)
    if not keys:
        raise listing.none_found(source, others, SPEC.source)
    numbers = np.array([_number(key, source) for key in keys])
    folder = Folder(source)

    def part(low: int, high: int, count: int | None, name: str) -> Entries:
        inside = np.flatnonzero((numbers > low) & (numbers <= high))
        chosen = listing.limited(len(inside), count, f"{source}, numbers {low + 1} to {high}", name)
        return folder.entries([keys[i] for i in inside[chosen]])

    train = part(0, LAST_TRAIN, options.train_examples, "train_examples")
    validation = part(LAST_TRAIN, LAST_VALIDATION, options.validation_examples, "validation_examples")
    return listing.complete(
        folder,
        train,
        validation,
        options,
        source_hash=folder.content_hash([*train.keys, *validation.keys], root, progress),
        facts={"pictures": len(keys), "other_files": others},
    )


def _number(key: str, source: Path) -> int:
    stem = Path(key).stem
    if not (stem.isascii() and stem.isdigit()):
        raise UsageError(f"{source / key}: its name is no number; celeba64 expects {SPEC.source}")
    return int(stem)


def tiny_source(folder: Path) -> Path:
    """Write a few made-up pictures in this layout; returns the source."""
    for number in (*range(1, 21), *range(LAST_TRAIN + 1, LAST_TRAIN + 7)):
        class_folders.draw_one(folder / f"{number:06d}.jpg", number, (178, 218))
    return folder
