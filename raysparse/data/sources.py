"""Where raw data comes from: a path that the user gives, or a download checked against a pinned checksum."""

from __future__ import annotations

import hashlib
import re
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
    if path.is_file() and _is_pinned(path, file, root):
        return path
    try:
        with files.atomic_path(path) as temporary:
            _fetch(file.url, temporary, progress)
            _check_pinned(temporary, file)
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        raise UsageError(
            f"cannot download {file.url} ({error}); get it where there is a network and give its path with --path"
        ) from error
    return path


def _pinned(file: Download) -> tuple[str, str] | None:
    """Which digest its authors publish, and what it is."""
    if file.sha256:
        return "sha256", file.sha256
    return ("md5", file.md5) if file.md5 else None


def _is_pinned(path: Path, file: Download, root: Path) -> bool:
    pinned = _pinned(file)
    if pinned is None:
        return True
    status = path.stat()
    state = hashlib.sha256(f"{pinned} {path.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()
    return remembered(state, root, lambda: _digest(path, pinned[0])) == pinned[1]


def _check_pinned(path: Path, file: Download) -> None:
    pinned = _pinned(file)
    if pinned and (digest := _digest(path, pinned[0])) != pinned[1]:
        raise UsageError(f"{file.url}: its {pinned[0]} is {digest}, not {pinned[1]}; try again, or give --path")


def _digest(path: Path, kind: str) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()


def _fetch(url: str, path: Path, progress: Callable[[int, int], None] | None) -> None:
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response, path.open("wb") as stream:  # https, from a SPEC
        total, done = int(response.headers.get("Content-Length") or 0), 0
        while block := response.read(_BLOCK_BYTES):
            stream.write(block)
            done += len(block)
            if progress:
                progress(done, max(total, done))
    if total and done != total:
        raise OSError(f"only {done} of {total} bytes came")


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
    """A sha256 or md5 that takes long to compute, kept under the hex digest of all that it depends on."""
    memory = root / "sources" / f"{state[:32]}.sha256"
    known = memory.read_bytes().strip() if memory.is_file() else b""
    if re.fullmatch(rb"[0-9a-f]{32}|[0-9a-f]{64}", known):  # else damaged, and made again
        return known.decode()
    computed = compute()
    files.write_text(memory, computed + "\n")
    return computed
