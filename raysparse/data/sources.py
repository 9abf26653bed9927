"""Where raw data comes from: a path that the user gives, or a download checked against a pinned checksum."""

from __future__ import annotations

import hashlib
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from raysparse import files
from raysparse.data.sketch import Download
from raysparse.errors import UsageError

_BLOCK_BYTES = 1 << 20
_TIMEOUT_S = 60


def downloaded(file: Download, root: Path, progress: Callable[[int, int], None] | None = None) -> Path:
    """The file in root/sources, fetched now unless it is there whole.

    UsageError where it cannot be fetched, or is not what the pinned checksum says (then nothing is kept).
    """
    path = root / "sources" / file.name
    if path.is_file() and (file.sha256 is None or files.sha256(path) == file.sha256):
        return path
    try:
        with files.atomic_path(path) as temporary:
            digest = _fetch(file.url, temporary, progress)
            if file.sha256 not in (None, digest):
                raise UsageError(f"{file.url}: its sha256 is {digest}, not {file.sha256}; try again, or give --path")
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        raise UsageError(
            f"cannot download {file.url} ({error}); get it where there is a network and give its path with --path"
        ) from error
    return path


def _fetch(url: str, path: Path, progress: Callable[[int, int], None] | None) -> str:
    """Download to a path; returns the sha256 of what came."""
    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response, path.open("wb") as stream:  # https, from a SPEC
        total, done = int(response.headers.get("Content-Length") or 0), 0
        while block := response.read(_BLOCK_BYTES):
            stream.write(block)
            digest.update(block)
            done += len(block)
            if progress:
                progress(done, max(total, done))
    if total and done != total:
        raise OSError(f"only {done} of {total} bytes came")
    return digest.hexdigest()


def content_hash(paths: Sequence[Path], root: Path) -> str:
    """One hash of the names and contents of several files, in the order given. UsageError where one cannot be read.

    Remembered by the files' paths, sizes and times: a trial that asks for a prepared Quick, Draw! does not read its
    gigabytes again.
    """
    state, reading = hashlib.sha256(), "cannot read {0.filename} ({0.strerror}); check the path and permissions"
    try:
        for path in paths:
            status = path.stat()
            state.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
    except OSError as error:
        raise UsageError(reading.format(error)) from error

    def compute() -> str:
        whole = hashlib.sha256()
        try:
            for path in paths:
                whole.update(f"{path.parent.name}/{path.name} {files.sha256(path)}\n".encode())
        except OSError as error:
            raise UsageError(reading.format(error)) from error
        return whole.hexdigest()

    return remembered(state.hexdigest(), root, compute)


def remembered(state: str, root: Path, compute: Callable[[], str]) -> str:
    """A sha256 that takes long to compute, kept in root/sources under the hex digest of all that it depends on."""
    memory = root / "sources" / f"{state[:32]}.sha256"
    if memory.is_file() and len(known := memory.read_text(encoding="ascii").strip()) == 64:
        return known
    computed = compute()
    files.write_text(memory, computed + "\n")
    return computed
