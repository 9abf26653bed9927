"""Files and folders that are whole or absent: written to a temporary name, fsynced, renamed. Sizes in words."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raysparse.errors import UsageError

TEMPORARY = ".writing-"  # prefix of a folder that is not whole yet, or no more
SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SIZES |= {f"{name[0]}iB": 2 ** (10 * power) for power, name in enumerate(("KB", "MB", "GB", "TB"), 1)}


def cache_folder(variable: str, name: str) -> Path:
    """The folder that the environment's `variable` names, or raysparse/`name` in the user's cache folder.

    UsageError: it names none, and the user has no home, as in a container.
    """
    chosen = os.environ.get(variable)
    if chosen:
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raysparse" / name
    except RuntimeError as error:
        raise UsageError(f"this user has no home folder: set {variable} to a folder of yours") from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`: renamed onto it when the block ends well, removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        sync(temporary)
        temporary.chmod(0o644)  # mkstemp makes 0600; a shared folder's other readers need more
        temporary.replace(path)
        sync(path.parent)  # else a crash may take the name back, and what was written after it stays
    except BaseException as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # a full disk, told by an open file or by pyarrow, has no name
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of `atomic_path(path)`; only for the one process that writes there.

    path: the name `*` stands for all of the folder.
    """
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """UsageError where a folder is not there and cannot be made, or takes no files; else it is there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}; give another folder") from error


def write_text(path: Path, text: str) -> None:
    """`text` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def set_aside(folder: Path) -> Path:
    """Take a folder's name away, at once, and give what it holds another one beside it, to be removed at leisure."""
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=TEMPORARY))
    try:
        folder.rename(aside)  # onto an empty folder: one step
    except BaseException:
        aside.rmdir()
        raise
    return aside


def remove_folder(folder: Path) -> None:
    """Remove a folder so that nothing half removed ever has its name."""
    shutil.rmtree(set_aside(folder), ignore_errors=True)


def size_bytes(text: str) -> int:
    """`500GB`, `1.5 TB`, `64MiB` or a number of bytes. UsageError for anything else."""
    number = text.rstrip("BKMGTi ")
    unit = text[len(number) :].strip()
    try:
        if unit in SIZES and (value := float(number) * SIZES[unit]) >= 1:
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise UsageError(f"a size is a number with one of {', '.join(list(SIZES)[1:])}, such as 500GB; got {text!r}")


def size_text(size: float) -> str:
    """1_530_000_000 -> `1.53 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
