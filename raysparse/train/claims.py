"""One process at a time trains a trial: OUT/trials/<id>/lock, held by rank 0, which alone writes what belongs to it."""

from __future__ import annotations

import fcntl
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ORPHAN_S = 10.0  # so long a process whose parent was killed may take to notice and end by itself


@contextmanager
def claimed(folder: Path, still_held: Callable[[str], None], said: str = "") -> Iterator[None]:
    """The right to train the trial of this folder; the system frees it when the process ends, however it ends.

    still_held: called with what the lock says each 10 s that another process has it, to end that one or to raise. said:
    what this one's says after its process and machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+", errors="replace") as stream:
        deadline = time.monotonic() + ORPHAN_S
        while not _try_lock(stream):
            if time.monotonic() > deadline:
                stream.seek(0)
                still_held(stream.read())
                deadline += ORPHAN_S
            time.sleep(0.05)
        stream.truncate(0)
        stream.write(f"{os.getpid()} {platform.node()}{said}")
        stream.flush()
        try:
            yield
        finally:
            fcntl.flock(stream, fcntl.LOCK_UN)


def _try_lock(stream: Any) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
