"""Which pictures make up a data set: what a data set's file finds in its source before any picture is read."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from raysparse import files, rng
from raysparse.data import sources
from raysparse.data.decoding import SUFFIXES, Raw
from raysparse.data.image import ImageOptions
from raysparse.errors import UsageError

_SEED = 0  # fixed: the splits are the same everywhere
VALIDATION_LIMIT = 2_500

Progress = Callable[[int, int], None]  # (done, total)


class Reader(Protocol):
    """Gets pictures by their keys. Picklable: it goes to the processes that encode."""

    def read(self, keys: Sequence[Any]) -> Iterator[Raw]:
        """One after the other, in the order of the keys."""


@dataclasses.dataclass(frozen=True)
class Entries:
    """The pictures of one split. keys: for the reader; ids: names for people; labels: int64 [N] or None."""

    keys: Sequence[Any]
    ids: Sequence[str]
    labels: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def part(self, start: int, stop: int) -> Entries:
        labels = None if self.labels is None else self.labels[start:stop]
        return Entries(self.keys[start:stop], self.ids[start:stop], labels)


@dataclasses.dataclass(frozen=True)
class Listing:
    """A data set before any picture is decoded.

    source_hash: of the content of all that is read; the prepared folder's name depends on it
    reference: often `train.part(0, n)`, which costs no space where pictures are kept as pixels
    """

    reader: Reader
    train: Entries
    validation: Entries
    reference: Entries
    source_hash: str
    classes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def complete(
    reader: Reader,
    train: Entries,
    validation: Entries,
    options: ImageOptions,
    *,
    source_hash: str,
    classes: Sequence[str] = (),
    facts: Mapping[str, Any] | None = None,
) -> Listing:
    """A Listing whose reference are the first `reference_examples` training pictures. UsageError for too many, for
    labels outside the classes, and for `conditional` without classes."""
    count = options.reference_examples or len(train)
    if count > len(train):
        raise UsageError(
            f"reference_examples is {count}, but there are {len(train)} training pictures; lower it or leave it out"
        )
    if options.conditional and not classes:
        raise UsageError("conditional needs classes, and this source has none; set conditional: false")
    for entries in (train, validation):
        check_labels(entries, classes)
    return Listing(reader, train, validation, train.part(0, count), source_hash, tuple(classes), facts or {})


def check_labels(entries: Entries, classes: Sequence[str]) -> None:
    """UsageError naming the first picture whose label is no class."""
    if entries.labels is None:
        return
    bad = np.flatnonzero((entries.labels < 0) | (entries.labels >= len(classes)))
    if len(bad):
        raise UsageError(
            f"{entries.ids[bad[0]]}: its class id {entries.labels[bad[0]]} is out of range; there are {len(classes)} "
            f"classes, 0 to {len(classes) - 1}"
        )


def shuffled(n: int) -> NDArray[np.int64]:
    """A fixed order of n pictures: the same everywhere, and any beginning of it a fair sample."""
    return rng.numpy_generator(_SEED, "picture order").permutation(n)


def split(n: int, options: ImageOptions, where: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Training and validation pictures among n (sorted by name), by a fixed shuffle; validation is its end, so that
    it stays what it is when train_examples changes. UsageError where the source has too few."""
    held_out = options.validation_examples or min(VALIDATION_LIMIT, max(1, n // 10))
    train = options.train_examples or n - held_out
    if train < 1 or train + held_out > n:
        raise too_few(n, where, train_examples=max(train, 1), validation_examples=held_out)
    order = shuffled(n)
    return order[:train], order[n - held_out :]


def limited(n: int, count: int | None, where: str, option: str) -> NDArray[np.int64]:
    """The first `count` (None: all) of n pictures in the fixed order. UsageError where there are fewer."""
    if n < 1 or (count or 1) > n:
        raise too_few(n, where, **{option: count or 1})
    return shuffled(n)[:count]


def too_few(n: int, where: str, **wanted: int) -> UsageError:
    asked = " and ".join(f"{name} {count}" for name, count in wanted.items())
    total = f", {sum(wanted.values())} in all" if len(wanted) > 1 else ""
    return UsageError(
        f"{where} has {n} pictures, but the options ask for {asked}{total}; get the whole data set, or set a smaller "
        f"{' or '.join(wanted)}"
    )


@dataclasses.dataclass(frozen=True)
class Folder:
    """Pictures as files; keys are paths relative to the folder."""

    path: Path

    def read(self, keys: Sequence[str]) -> Iterator[Path]:
        return (self.path / key for key in keys)

    def entries(self, keys: Sequence[str], labels: NDArray[np.int64] | None = None) -> Entries:
        return Entries(list(keys), [printable(key) for key in keys], labels)

    def content_hash(self, keys: Sequence[str], root: Path, progress: Progress | None = None) -> str:
        """Of the names and contents of these pictures, in this order; remembered by sizes and times.

        progress: (done, total) in pictures."""
        base = self.path.resolve()
        state = hashlib.sha256(f"{base}\n".encode(errors="surrogateescape"))
        for key in keys:
            state.update(f"{key} {_status(base / key)}\n".encode(errors="surrogateescape"))
        return sources.remembered(state.hexdigest(), root, lambda: self._hash(keys, progress))

    def _hash(self, keys: Sequence[str], progress: Progress | None) -> str:
        whole = hashlib.sha256()
        for done, key in enumerate(keys):
            if progress and done % 500 == 0:
                progress(done, len(keys))
            try:
                digest = files.sha256(self.path / key)
            except OSError as error:  # it is named as damaged when it is to be read
                digest = f"unreadable ({error.strerror})"
            whole.update(f"{key} {digest}\n".encode(errors="surrogateescape"))
        return whole.hexdigest()


def _status(path: Path) -> str:
    try:
        status = os.stat(path)
    except OSError as error:
        return str(error.strerror)
    return f"{status.st_size} {status.st_mtime_ns}"


def printable(name: str) -> str:
    """A file's name as text: bytes of it that are no UTF-8 as \\x escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def find(folder: Path) -> tuple[list[str], int]:
    """Pictures in a folder and its subfolders: relative paths, sorted, and the number of other files.

    By suffix, in any case; links are followed, each real folder once; names that begin with a dot are left out.
    UsageError where the folder does not exist or cannot be read.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; give the path of a folder of pictures")
    found, others = [], 0
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise UsageError(f"cannot read {error.filename} ({error.strerror}); check its permissions")

    for place, inner, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(place)
        if real in seen:  # a link back into the folder
            inner.clear()
            continue
        seen.add(real)
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        within = os.path.relpath(place, folder)
        for name in names:
            if name.startswith("."):
                continue
            if os.path.splitext(name)[1].lower() in SUFFIXES and not _is_special(os.path.join(place, name)):
                found.append(name if within == "." else os.path.join(within, name))
            else:
                others += 1
    return sorted(found), others


def _is_special(path: str) -> bool:
    """A pipe, a socket or a device, from which reading would wait or never end. A link into the void is none: it is
    named as damaged."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def none_found(folder: Path, others: int, expects: str) -> UsageError:
    kinds = ", ".join(sorted(SUFFIXES))
    return UsageError(f"{folder} has no pictures ({kinds}; {others} other files); expected: {expects}")
