"""One shard of a prepared set of pictures: read, cropped, encoded and written as a Parquet file by one task.

A task runs in any process and on any machine that sees the folder. A shard that is there whole is not made again, so a
prepare that was killed goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raysparse import files
from raysparse.data import decoding, table
from raysparse.data.decoding import Damaged, Raw
from raysparse.data.image import Encoder, ImageOptions
from raysparse.data.listing import Entries, Reader
from raysparse.errors import UsageError

T = TypeVar("T")
R = TypeVar("R")
Content = Literal["pixels", "png", "latents"]

RECIPE = 2  # raise it whenever the same pictures and options would give other arrays
SMALLEST = 32  # pictures of a shard: what a killed prepare loses at most, per process
MOST_SHARDS = 256  # of a split; a larger set has larger shards
ENCODED_AT_ONCE = 16  # pictures of 256 px, of which an encoder's activations take 6 GB
_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}
_CELEBA = (89 - 64, 121 - 64, 89 + 64, 121 + 64)  # left, upper, right, lower of an aligned picture
_CELEBA_SIZE = (178, 218)


class Run(Protocol):
    """Applies a top-level picklable function to every task; results in any order, as they finish."""

    def __call__(self, function: Callable[[T], R], tasks: Sequence[T], /) -> Iterator[R]: ...


def in_order(function: Callable[[T], R], tasks: Sequence[T], /) -> Iterator[R]:
    """The plain local Run: one after the other, in this process."""
    return map(function, tasks)


@dataclasses.dataclass(frozen=True)
class Task:
    """One shard to be made: these pictures into that file."""

    path: Path
    split: str
    identity: str  # of all that decides what is in it: a file of another identity is not reused
    reader: Reader
    entries: Entries
    start: int  # place of the first of them in the split
    options: ImageOptions
    content: Content
    flips: bool  # latents of the mirrored pictures too
    encoder: Encoder | None


@dataclasses.dataclass(frozen=True)
class Shard:
    """A finished one. damaged: (place in the split, id, reason) of what could not be read."""

    name: str
    split: str
    start: int
    rows: int
    damaged: tuple[tuple[int, str, str], ...]
    bytes: int
    sha256: str


def plan(entries: Entries, folder: Path, split: str, *, source_hash: str, **common: Any) -> list[Task]:
    """The tasks of one split. source_hash: of what the entries are read from; common: the other fields of Task."""
    rows = max(SMALLEST, -(-len(entries) // MOST_SHARDS))
    starts = range(0, len(entries), rows)
    return [
        Task(
            path=folder / f"{split}-{number:05d}-of-{len(starts):05d}.parquet",
            split=split,
            identity=_identity(entries.part(start, start + rows), start, source_hash, **common),
            entries=entries.part(start, start + rows),
            start=start,
            **common,
        )
        for number, start in enumerate(starts)
    ]


def _identity(
    entries: Entries,
    start: int,
    source_hash: str,
    *,
    options: ImageOptions,
    content: Content,
    flips: bool,
    encoder: Encoder | None,
    **_: Any,
) -> str:
    shape = (options.size_px, options.resize, options.filter)
    encoding = encoder.identity if encoder else None
    whole = hashlib.sha256(json.dumps([RECIPE, source_hash, start, shape, content, flips, encoding]).encode())
    whole.update("\n".join(entries.ids).encode())
    if entries.labels is not None:
        whole.update(entries.labels.astype(np.int64).tobytes())
    return whole.hexdigest()


def adopt(task: Task, donors: Iterable[Path]) -> None:
    """Link the same shard of another prepared folder: pictures are not encoded again because another option changed."""
    for donor in donors:
        try:
            if not task.path.exists() and table.glance(donor)["identity"] == task.identity:
                os.link(donor, task.path)
        except (OSError, ValueError, KeyError):
            continue  # another set's, damaged, or a file system without links: it is made anew


def finished(task: Task) -> Shard | None:
    """The shard of a task where it is there whole; a damaged one, or another set's, is removed."""
    try:
        facts = table.read_facts(task.path)
        if facts["identity"] == task.identity:
            return _shard(task, facts["rows"], tuple((place, name, why) for place, name, why in facts["damaged"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError):
        pass
    task.path.unlink(missing_ok=True)
    return None


def make(task: Task) -> Shard:
    """Read, encode and write one shard. OSError where the disk is full; UsageError for a picture of a wrong size where
    no resize is chosen."""
    kept, damaged, pictures = [], [], []
    for i, (name, raw) in enumerate(zip(task.entries.ids, task.reader.read(task.entries.keys), strict=True)):
        try:
            pictures.append(square(raw, task.options, name))
            kept.append(i)
        except Damaged as reason:
            damaged.append((task.start + i, name, str(reason)))
    side = task.options.size_px
    whole = np.stack(pictures) if pictures else np.empty((0, 3, side, side), np.uint8)
    labels = task.entries.labels
    columns: dict[str, Any] = {
        "id": [task.entries.ids[i] for i in kept],
        "label": np.full(len(kept), -1) if labels is None else labels[kept],
        "sha256": _digests(whole),
    }
    columns |= _content(task, whole)
    facts = {"identity": task.identity, "rows": len(kept), "damaged": damaged}
    table.write_parquet(task.path, columns, facts)
    return _shard(task, len(kept), tuple(damaged))


def _shard(task: Task, rows: int, damaged: tuple[tuple[int, str, str], ...]) -> Shard:
    size, digest = task.path.stat().st_size, files.sha256(task.path)
    return Shard(task.path.name, task.split, task.start, rows, damaged, size, digest)


def _digests(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """sha256 of each picture's pixels: uint8 [N, 32]."""
    joined = b"".join(hashlib.sha256(picture.tobytes()).digest() for picture in pictures)
    return np.frombuffer(joined, np.uint8).reshape(len(pictures), 32)


def _content(task: Task, pictures: NDArray[np.uint8]) -> dict[str, Any]:
    if task.content == "pixels":
        return {"pixels": pictures}
    if task.content == "png":
        return {"png": [decoding.png(picture) for picture in pictures]}
    assert task.encoder is not None
    columns = {"latent": encoded(task.encoder, pictures)}
    if task.flips:
        columns["latent_flipped"] = encoded(task.encoder, np.ascontiguousarray(pictures[..., ::-1]))
    return columns


def encoded(encoder: Encoder, pictures: NDArray[np.uint8]) -> NDArray[np.float16]:
    """Latents of pictures uint8 [N, 3, H, W]. UsageError where a latent is not finite in float16."""
    import torch

    latents = np.empty((len(pictures), *encoder.latent_shape(pictures.shape[-1])), np.float16)
    at_once = max(1, ENCODED_AT_ONCE * 256**2 // pictures.shape[-1] ** 2)
    for start in range(0, len(pictures), at_once):
        part = slice(start, start + at_once)
        latents[part] = encoder(torch.from_numpy(pictures[part])).numpy()
    if not np.isfinite(latents).all():
        raise UsageError(
            "the first stage gives latents that are not finite in float16; its weights are damaged, or it is not a "
            "VQ or KL autoencoder of pictures in [-1, 1]"
        )
    return latents


def square(raw: Raw, options: ImageOptions, name: str) -> NDArray[np.uint8]:
    """A picture in the size of the data set: uint8 [3, size_px, size_px]. Damaged where it cannot be read; UsageError
    naming it where its size is not what `resize` takes."""
    image = decoding.decode(raw)
    check_size(image.size, options, name)
    side = (options.size_px, options.size_px)
    if options.resize == "none":
        return decoding.pixels(image)
    box = _CELEBA if options.resize == "celeba" else decoding.centre_square(image)
    image = image.crop(box)
    return decoding.pixels(image if image.size == side else image.resize(side, _FILTERS[options.filter]))


def check_size(size: tuple[int, int], options: ImageOptions, name: str) -> None:
    """UsageError naming the picture where its (width, height) is not what `resize` takes."""
    side = options.size_px
    got = f"{size[0]}x{size[1]} pixels"
    if options.resize == "none" and size != (side, side):
        raise UsageError(
            f"{name} has {got}, but resize: none takes pictures of {side}x{side} (size_px) only; set resize: centre to "
            "crop and resize them, or another size_px"
        )
    if options.resize == "celeba" and size != _CELEBA_SIZE:
        raise UsageError(
            f"{name} has {got}, but resize: celeba takes the aligned pictures of 178x218 (img_align_celeba); set "
            "resize: centre for others"
        )


def check_sizes(reader: Reader, entries: Entries, options: ImageOptions) -> None:
    """`check_size` of every picture from its header, before hours of encoding. What is damaged is passed over here."""
    if options.resize == "centre":
        return
    for name, raw in zip(entries.ids, reader.read(entries.keys), strict=True):
        try:
            check_size(decoding.size(raw), options, name)
        except Damaged:
            continue
