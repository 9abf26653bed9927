"""CIFAR-10: from its python batches, read without running what a pickle asks for, or from class folders."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from raysparse.data import class_folders, listing, pickles, prepared, sources, stores
from raysparse.data.image import ImageOptions
from raysparse.data.listing import Entries, Listing
from raysparse.data.sketch import Download, Spec
from raysparse.errors import UsageError

_ARCHIVE = Download(
    "cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    None,
    "c58f30108f718f92721af3b95e74349a",  # its authors publish MD5 sums, no others
)

SPEC = Spec(
    name="cifar10",
    title="CIFAR-10",
    licence="none is stated; used for research",
    citation="A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
    source="cifar-10-python.tar.gz, its folder cifar-10-batches-py, or train/ and test/ with a folder per class",
    splits={
        "train": "data_batch_1 to data_batch_5: 50,000 pictures, in a fixed shuffle",
        "validation": "test_batch: 10,000 pictures",
        "reference": "the training pictures, or the first `reference_examples` of them",
    },
    downloads=(_ARCHIVE,),
    kind="image",
)

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAIN_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_BATCH = "test_batch"
SIDE = 32


class Options(ImageOptions):
    size_px: int = Field(SIDE, ge=1, le=4096)
    flips: bool = True  # DDPM and SparseDM mirror
    train_examples: int | None = Field(50_000, ge=1)
    validation_examples: int | None = Field(10_000, ge=1)


def find(options: Options, *, source: Path | None, root: Path, progress: prepared.Progress | None = None) -> Listing:
    """The pictures of the batches or folders. UsageError for a pickle that names anything but arrays, for a batch of
    another form, for a class id out of range, and for fewer than asked for."""
    if source is None:
        source = sources.downloaded(_ARCHIVE, root, progress)
    if not source.exists():
        raise UsageError(f"{source} does not exist; cifar10 expects {SPEC.source}")
    folder = stores.unpacked(source, root) if stores.is_tar(source) else source
    batches = next(
        (place for place in (folder, folder / "cifar-10-batches-py") if (place / TEST_BATCH).is_file()), None
    )
    if batches is not None:
        return _batches(batches, options, root)
    halves = class_folders.split_folders(folder)
    if halves is None:
        raise UsageError(f"{source} has neither {TEST_BATCH} nor train/ and test/; cifar10 expects {SPEC.source}")
    return class_folders.halves(folder, *halves, options, root, SPEC.source, CLASSES, progress=progress)


def _batches(folder: Path, options: Options, root: Path) -> Listing:
    train = [name for name in TRAIN_BATCHES if (folder / name).is_file()]
    if not train:
        raise UsageError(f"{folder} has no {TRAIN_BATCHES[0]}; cifar10 expects {SPEC.source}")
    return listing.complete(
        Batches(folder),
        _entries(folder, train, options.train_examples, "train_examples"),
        _entries(folder, [TEST_BATCH], options.validation_examples, "validation_examples"),
        options,
        source_hash=sources.content_hash([folder / name for name in (*train, TEST_BATCH)], root),
        classes=CLASSES,
        facts={"batches": [*train, TEST_BATCH]},
    )


def _entries(folder: Path, names: Sequence[str], count: int | None, option: str) -> Entries:
    keys, labels = [], []
    for name in names:
        _, found = _batch(folder / name)
        keys += [(name, row) for row in range(len(found))]
        labels.append(found)
    chosen = listing.limited(len(keys), count, f"{folder}, {' and '.join(names)}", option)
    picked = [keys[i] for i in chosen]
    return Entries(picked, [f"{name}, row {row}" for name, row in picked], np.concatenate(labels)[chosen])


@dataclasses.dataclass(frozen=True)
class Batches:
    """The pictures of the python batches; keys are (name of the batch, row)."""

    folder: Path

    def read(self, keys: Sequence[tuple[str, int]]) -> Iterator[NDArray[np.uint8]]:
        return (np.ascontiguousarray(_batch(self.folder / name)[0][row].transpose(1, 2, 0)) for name, row in keys)


def _batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    status = path.stat()
    return _read(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=len(TRAIN_BATCHES) + 1)  # 30 MB each: a shard takes its pictures from all of them
def _read(path: Path, size: int, time_ns: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pictures uint8 [N, 3, 32, 32] and labels int64 [N] of a batch."""
    batch: Any = pickles.load(path.read_bytes(), str(path))
    try:
        data, labels = (batch[name] if name in batch else batch[name.encode()] for name in ("data", "labels"))
        pictures, numbers = np.asarray(data), np.asarray(labels)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path}: not a CIFAR-10 batch (no {error}); get it again") from error
    if pictures.dtype != np.uint8 or pictures.ndim != 2 or pictures.shape[1] != 3 * SIDE * SIDE:
        got = f"{pictures.dtype} {list(pictures.shape)}"
        raise UsageError(f"{path}: data must be uint8 [N, {3 * SIDE * SIDE}], got {got}; get it again")
    if numbers.shape != (len(pictures),) or numbers.dtype.kind not in "iu":
        raise UsageError(f"{path}: labels must be {len(pictures)} whole numbers; get it again")
    return pictures.reshape(-1, 3, SIDE, SIDE), numbers.astype(np.int64)


def tiny_source(folder: Path) -> Path:
    """Write small batches in this format; returns the source."""
    import pickle

    generator = np.random.default_rng(0)
    for name in (*TRAIN_BATCHES, TEST_BATCH):
        batch = {
            "batch_label": name,
            "labels": [int(label) for label in generator.permutation(10)],
            "data": generator.integers(0, 256, (10, 3 * SIDE * SIDE), dtype=np.uint8),
            "filenames": [f"{name}_{i}.png" for i in range(10)],
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return folder
