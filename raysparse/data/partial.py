"""A folder in the making: one process builds in it at a time, and what a killed one left is there for the next."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A lock on a folder, free again when its holder's process ends, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """The folder beside `folder` in which this process alone builds. It stays when the block fails, unless empty."""
    partial = folder.parent / f".{folder.name}.partial"
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if not _same(handle, partial):  # renamed or removed while this process waited for the lock
                continue
            try:
                yield partial
            finally:
                _tidy(partial)
            return
        finally:
            os.close(handle)


def publish(partial: Path, folder: Path) -> None:
    """Rename into place. What is there already was not made by us, or is damaged, and is replaced."""
    _tidy(partial)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def _same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _tidy(partial: Path) -> None:
    """Remove what a process that was killed had not finished to write, and folders with nothing in them."""
    for place in (*(p for p in partial.glob("*") if p.is_dir()), partial):
        for left in place.glob(".*.tmp"):
            left.unlink(missing_ok=True)
        try:
            place.rmdir()
        except OSError:
            continue  # something is in it
