"""A folder of files that is whole or absent; which of a trial's folders are its checkpoints."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raysparse import files
from raysparse.errors import UsageError

CHECKPOINT = re.compile(r"step-[0-9]+")  # the name of one; what is half written, or a person's copy, has another


def checkpoints(trial: Path) -> list[Path]:
    """A trial's checkpoints by step; `step-<k>` is zero-padded, so by name."""
    return sorted(path for path in trial.glob("step-*") if CHECKPOINT.fullmatch(path.name) and path.is_dir())


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`: fsynced and renamed to it when the block ends well, else removed.

    UsageError where `path` is there and not an empty folder, and where it cannot be written.
    """
    from safetensors import SafetensorError

    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UsageError(f"{path} is there and is no folder; give a new one")
    if path.is_dir() and any(path.iterdir()):
        raise UsageError(f"{path} is not empty; give a new folder, nothing is overwritten")
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.writing-"))
        yield temporary
        for written in [*temporary.rglob("*"), temporary]:
            written.chmod(0o755 if written.is_dir() else 0o644)  # mkdtemp makes 0700, safetensors 0600
            files.sync(written)
        temporary.rename(path)
        files.sync(path.parent)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        # safetensors tells a full disk as an error of its own
        if isinstance(error, OSError | SafetensorError):
            raise UsageError(f"cannot write {path}: {error}; check permissions and free space") from error
        raise
