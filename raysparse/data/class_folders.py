"""Pictures in folders: the class is the first folder, the split by folders' names or by a fixed shuffle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raysparse import rng
from raysparse.data import listing
from raysparse.data.image import ImageOptions
from raysparse.data.listing import Entries, Folder, Listing, Progress
from raysparse.errors import UsageError

VALIDATION_NAMES = ("val", "valid", "validation", "test")


def split_folders(source: Path) -> tuple[str, str] | None:
    """The names of the folders of training and validation pictures, where there are both; val before test."""
    if not (source / "train").is_dir():
        return None
    for name in VALIDATION_NAMES:
        if (source / name).is_dir():
            return "train", name
    return None


def whole(source: Path, options: ImageOptions, root: Path, expects: str, progress: Progress | None = None) -> Listing:
    """One folder, split by a fixed shuffle. UsageError as the functions below."""
    keys, others = _found(source, expects)
    classes = _classes(source, keys) if options.conditional else ()
    labels = _labels(keys, classes, source) if options.conditional else None
    folder = Folder(source)
    train, held_out = listing.split(len(keys), options, str(source))
    return listing.complete(
        folder,
        _chosen(folder, keys, labels, train),
        _chosen(folder, keys, labels, held_out),
        options,
        source_hash=folder.content_hash([keys[i] for i in np.concatenate([train, held_out])], root, progress),
        classes=classes,
        facts={"pictures": len(keys), "other_files": others},
    )


def halves(
    source: Path,
    train: str,
    validation: str,
    options: ImageOptions,
    root: Path,
    expects: str,
    classes: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Listing:
    """A folder with one for each split. classes: the folders that must be there; None: those of the training pictures.

    UsageError for a folder without pictures, fewer than the options ask for, and where the classes do not agree.
    """
    folder, found, others = Folder(source), {}, {}
    for name in (train, validation):
        keys, others[f"other_files_{name}"] = _found(source / name, expects)
        found[name] = keys
    names: Sequence[str] = ()
    if options.conditional or classes is not None:
        names = classes or _classes(source / train, found[train])
        lacking = set(names) - {listing.printable(key.partition("/")[0]) for key in found[train]}
        if lacking:
            raise UsageError(f"class folder {source / train / min(lacking)} has no pictures; get the whole data set")
    picked = {
        train: listing.limited(len(found[train]), options.train_examples, str(source / train), "train_examples"),
        validation: listing.limited(
            len(found[validation]), options.validation_examples, str(source / validation), "validation_examples"
        ),
    }
    entries = {}
    for name, keys in found.items():
        labels = _labels(keys, names, source / name) if names else None
        entries[name] = _chosen(folder, [f"{name}/{key}" for key in keys], labels, picked[name])
    return listing.complete(
        folder,
        entries[train],
        entries[validation],
        options,
        source_hash=folder.content_hash([*entries[train].keys, *entries[validation].keys], root, progress),
        classes=names,
        facts={"pictures": sum(map(len, found.values())), **others},
    )


def _found(folder: Path, expects: str) -> tuple[list[str], int]:
    keys, others = listing.find(folder)
    if not keys:
        raise listing.none_found(folder, others, expects)
    return keys, others


def _classes(folder: Path, keys: Sequence[str]) -> tuple[str, ...]:
    """Names of the class folders, sorted. UsageError for one without pictures and for a picture in none of them."""
    used = {key.partition("/")[0] for key in keys if "/" in key}
    there = {place.name for place in folder.iterdir() if place.is_dir() and not place.name.startswith(".")}
    if not used:
        raise UsageError(f"{folder} has no folder per class, which `conditional` needs; set conditional: false")
    if there - used:
        raise UsageError(f"class folder {folder / min(there - used)} has no pictures; fill it or remove it")
    return tuple(listing.printable(name) for name in sorted(used))


def _labels(keys: Sequence[str], classes: Sequence[str], folder: Path) -> NDArray[np.int64]:
    number = {name: i for i, name in enumerate(classes)}
    labels = np.empty(len(keys), np.int64)
    for i, key in enumerate(keys):
        name, inside, _ = key.partition("/")
        if not inside:
            raise UsageError(f"{folder / key} is in no class folder; move it into one, or set conditional: false")
        label = number.get(listing.printable(name))
        if label is None:
            raise UsageError(
                f"{folder / key}: its folder {name!r} is none of the {len(classes)} classes ({', '.join(classes[:5])}, "
                "...); remove it, or add it to the training pictures"
            )
        labels[i] = label
    return labels


def _chosen(folder: Folder, keys: Sequence[str], labels: NDArray[np.int64] | None, which: NDArray[np.int64]) -> Entries:
    return folder.entries([keys[i] for i in which], None if labels is None else labels[which])


def draw_tiny(folder: Path, classes: Sequence[str], count: int, size_px: int) -> Path:
    """A few made-up pictures per class, for tests: coloured discs on noise. No classes: no subfolders."""
    for number, name in enumerate(classes or ("",)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            draw_one(folder / name / f"{i:04d}.png", 1000 * number + i, (size_px, size_px))
    return folder


def draw_one(path: Path, seed: int, size: tuple[int, int]) -> None:
    """One made-up picture of (width, height)."""
    from PIL import Image

    # The folder in the key: the same name in train/ and val/ is not the same picture.
    place = "/".join(path.parts[-3:-1])
    generator, (width, height) = rng.numpy_generator(seed, f"tiny picture {place}"), size
    rows, columns = np.indices((height, width)) / max(size)
    image = generator.integers(0, 256, 3) + generator.normal(0, 8, (height, width, 3))
    for _ in range(3):
        y, x, radius = generator.uniform(0.2, 0.8), generator.uniform(0.2, 0.8), generator.uniform(0.05, 0.3)
        image[np.hypot(rows - y, columns - x) < radius] = generator.integers(0, 256, 3)
    Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(path)
