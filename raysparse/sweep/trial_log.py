"""What a trial's process says, kept where everyone who sees the results can read it: RESULTS/trials/<id>/log.txt.

Ray's own logs lie on the node that ran the trial and are lost with it. So file descriptors 1 and 2 of the process point
to the trial's log while it trains: Python's lines are there, and also what C++ and CUDA say as they die. Nothing stands
between the writer and the file that could block it or be lost with it; a thread copies the lines on to where they would
have gone, for Ray's dashboard, and cuts the file.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from raysparse.sweep import leaving

Train = TypeVar("Train", bound=Callable[..., None])

LIMIT_BYTES = 256 * 2**10  # then the older half goes
COPY_S = 1.0
TAIL_LINES = 20

_active: list[_Redirect] = []  # at most one; a process trains one trial at a time


def kept(train_rank: Train) -> Train:
    """Wraps `train_rank(config, say, *, rank)`: its output, what it says and what it raises go to its trial's log."""

    @functools.wraps(train_rank)
    def logged(config: dict[str, Any], say: Callable[[Any], Any], *, rank: int = 0, **more: Any) -> None:
        folder = Path(config["results"]) / "trials" / config["trial_id"]

        def noted(metrics: dict[str, Any]) -> Any:
            note(_words(metrics))
            return say(metrics)

        with written_to(path_of(folder, rank)):
            note(f"process {os.getpid()} on {platform.node()} begins, rank {rank}")
            try:
                train_rank(config, noted, rank=rank, **more)
            except leaving.NodeGoes as gone:
                note(str(gone))
                raise
            except Exception:
                note(traceback.format_exc())
                raise

    return logged  # type: ignore[return-value]


def path_of(folder: Path, rank: int = 0) -> Path:
    """The log of one rank of the trial that has this folder."""
    return folder / ("log.txt" if rank == 0 else f"log-{rank}.txt")


def tail(folder: Path, lines: int = TAIL_LINES) -> list[str]:
    """The last lines of a trial's log, with the error that ended it; nothing where it has said nothing."""
    said = _last_lines(path_of(folder), lines)
    error = _last_lines(folder / "error.txt", lines)
    if not any("Traceback (most recent call last)" in line for line in said):
        said += error
    return said[-lines:]


def note(text: str) -> None:
    """A line or more, with the time, in the log that is open; a log that cannot be written stops no trial."""
    if _active:
        with contextlib.suppress(OSError):
            os.write(_active[0].log, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text.rstrip()}\n".encode(errors="replace"))


def descriptor() -> int | None:
    """Of the log that is open, for what writes there from a signal's handler; None where there is none."""
    return _active[0].log if _active else None


@contextlib.contextmanager
def written_to(path: Path) -> Iterator[None]:
    """Standard output and error of this process go to `path` while the block runs, as far as it can be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError:
        yield
        return
    for left in list(_active):  # a trial whose thread was given up
        left.end()
    redirect = _Redirect(log)
    try:
        yield
    finally:
        redirect.end()


class _Redirect:
    """From construction to `end`: descriptors 1 and 2 and Python's streams write to the log."""

    def __init__(self, log: int) -> None:
        self.log = log
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._copied = os.fstat(log).st_size
        self._streams = (sys.stdout, sys.stderr)
        _flush(*self._streams)
        self._before = [os.dup(number) for number in (1, 2)]
        for number in (1, 2):
            os.dup2(log, number)
        sys.stdout, sys.stderr = _Forgiving(log), _Forgiving(log)
        self._thread = threading.Thread(target=self._copy_on, name="trial log", daemon=True)
        self._thread.start()
        _active.append(self)

    def end(self) -> None:
        """Everything as it was; a second call does nothing."""
        with self._lock:
            if self not in _active:
                return
            _active.remove(self)
        sys.stdout, sys.stderr = self._streams
        for number, before in zip((1, 2), self._before, strict=True):
            os.dup2(before, number)
        self._ended.set()
        self._thread.join(timeout=5)
        if not self._thread.is_alive():
            for descriptor in (self.log, *self._before):
                os.close(descriptor)

    def _copy_on(self) -> None:
        while not self._ended.wait(COPY_S):
            self._copy()
        self._copy()

    def _copy(self) -> None:
        with contextlib.suppress(OSError):
            size = os.fstat(self.log).st_size
            if size < self._copied:  # cut by another process
                self._copied = 0
            fresh = os.pread(self.log, min(size - self._copied, LIMIT_BYTES), self._copied)
            self._copied = size
            if fresh:
                os.write(self._before[1], fresh)
            if size > LIMIT_BYTES:  # what is written right now may be lost, the lines before and after are whole
                rest = os.pread(self.log, LIMIT_BYTES // 2, size - LIMIT_BYTES // 2)
                os.ftruncate(self.log, 0)
                os.write(self.log, rest[rest.find(b"\n") + 1 :])
                self._copied = os.fstat(self.log).st_size


class _Forgiving:
    """A text stream on a descriptor that never raises: a full disk is the checkpoints' to report, not a print's."""

    encoding, errors = "utf-8", "replace"

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            os.write(self._descriptor, text.encode(errors="replace"))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        """Nothing is held back."""

    def isatty(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor


def _words(metrics: dict[str, Any]) -> str:
    """A report in one line."""
    if metrics.get("failed"):
        return f"step {metrics['step']}: failed: {metrics['failed']}"
    numbers = (
        ("loss", "train_loss"),
        ("FID", "fid"),
        ("intermediate FID", "intermediate_fid"),
        ("density", "density"),
    )
    shown = ", ".join(f"{name} {metrics[key]:.4g}" for name, key in numbers if metrics.get(key) is not None)
    return f"step {metrics['step']}: {shown}"


def _last_lines(path: Path, lines: int) -> list[str]:
    """Of a text file, read from its end; longer lines than a screen's are cut."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(stream.seek(0, os.SEEK_END) - 2**16, 0))
            text = stream.read().decode(errors="replace")
    except OSError:
        return []
    return [printable(line)[:400] for line in text.splitlines() if line.strip()][-lines:]


def printable(line: str) -> str:
    """Without control characters: what a log or a journal says must not steer the terminal that shows it."""
    return "".join(sign if sign.isprintable() else " " for sign in line.expandtabs(4)).rstrip()


def _flush(*streams: Any) -> None:
    for stream in streams:
        with contextlib.suppress(Exception):
            stream.flush()
