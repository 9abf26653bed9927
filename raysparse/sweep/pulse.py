"""A rank that gets nowhere: its own watcher sees it, says where every rank stands, and ends it.

The watcher (_watcher.py) is a small process beside each rank, for a thread of the rank's own would hang with it: in a
stopped process, or behind a C call that holds the interpreter. The rank tells it of each step, each part of an
evaluation, and of what it waits for by right (a report to be taken, storage, another rank's work). Ending the ranks is
the loss of a process like any other: the trial starts again from its checkpoint, and three deaths at one place fail it.

    trials/<id>/log.txt, log-<rank>.txt   the stacks of all threads of a rank
                hung.txt                  where each rank stood in a start that hung, in a line; until the next start
                hang-<attempt>/           the watchers' votes and what they told; of the latest start
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from raysparse.sweep import trial_log

HUNG = "hung.txt"
BEAT_S = 0.5  # a rank says at most so often that it got on: of a thousand steps a second each costs 1 µs more
# A real-time signal: SIGUSR1 is what batch systems send before they take a machine away, SIGUSR2 is NCCL's and Ray's.
STACKS_SIGNAL = signal.SIGRTMIN + 7 if hasattr(signal, "SIGRTMIN") else None
WATCHER = Path(__file__).with_name("_watcher.py")

_active: list[Pulse] = []  # at most one; a process trains one trial at a time


class Pulse:
    """The rank's side. Used as a context; all calls are cheap, and none fails where the watcher is gone.

    limit_s: of no progress, `Resources.hung_after_s`. compiles: a step may take minutes on all cores. attempt: a name
    that all ranks of this start of the trial share, and no other start has.
    """

    def __init__(
        self, folder: Path, rank: int, world_size: int, limit_s: float, attempt: str, *, compiles: bool = False
    ) -> None:
        self._folder, self._rank, self._world_size = folder, rank, world_size
        self._votes = folder / f"hang-{attempt}"
        self._limit_s, self._compiles = limit_s, compiles
        self._said, self._doing = 0.0, ""
        self._watcher: subprocess.Popen[bytes] | None = None
        self._step = 0

    def __enter__(self) -> Pulse:
        for left in list(_active):  # of a trial whose thread was given up
            left.end()
        log = trial_log.descriptor()
        if log is None or STACKS_SIGNAL is None or not Path("/proc/self/stat").exists():
            return self  # nowhere to say it, or no Linux: the half hour that torch waits in a collective has to do
        settings: list[Any] = [os.getpid(), self._votes, self._rank, self._world_size, self._limit_s]
        settings += [int(self._compiles), trial_log.path_of(self._folder, self._rank), int(STACKS_SIGNAL)]
        try:
            if self._rank == 0:
                self._forget_earlier()
            self._watcher = subprocess.Popen(  # -I and -S: nothing but the standard library, so 5 MB and 20 ms
                [sys.executable, "-I", "-S", str(WATCHER), *map(str, settings)], stdin=subprocess.PIPE
            )
        except OSError as error:  # no memory, no storage: the trial has more to say of that
            trial_log.note(f"not watched for hanging: {error}")
            return self
        faulthandler.register(STACKS_SIGNAL, file=log, all_threads=True)
        assert self._watcher.stdin
        os.set_blocking(self._watcher.stdin.fileno(), False)
        _active.append(self)
        self._tell("wait", "to be built")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()

    def end(self) -> None:
        """Nobody watches any more; a second call does nothing."""
        if self not in _active:
            return
        _active.remove(self)
        assert self._watcher is not None
        assert self._watcher.stdin
        assert STACKS_SIGNAL is not None
        self._watcher.stdin.close()  # tells it to go
        try:
            self._watcher.wait(timeout=5)
        except subprocess.TimeoutExpired:  # storage that does not answer
            self._watcher.kill()
        faulthandler.unregister(STACKS_SIGNAL)

    def beat(self, doing: str, step: int) -> None:
        """The rank got on. doing: step or evaluation."""
        if doing == self._doing and time.monotonic() - self._said < BEAT_S:
            return
        self._step = step
        self._tell(doing, str(step))

    @contextlib.contextmanager
    def waits(self, what: str, *, without_end: bool = False) -> Iterator[None]:
        """In this block the rank may stand still, half an hour or without end. what: it waits for, in words."""
        self._tell("idle" if without_end else "wait", what)
        try:
            yield
        finally:
            self._tell("begin", str(self._step))  # a first step may be one that is compiled

    def _forget_earlier(self) -> None:
        (self._folder / HUNG).unlink(missing_ok=True)
        for left in self._folder.glob("hang-*"):
            if left != self._votes:
                shutil.rmtree(left, ignore_errors=True)

    def _tell(self, doing: str, words: str) -> None:
        self._said, self._doing = time.monotonic(), doing
        if self in _active and self._watcher is not None and self._watcher.stdin is not None:
            with contextlib.suppress(OSError, ValueError):  # full, gone, closed
                os.write(self._watcher.stdin.fileno(), f"{doing} {words}\n".encode())


def hung(folder: Path) -> str | None:
    """Where the ranks of a trial stood when they were ended since its last start; None where they were not."""
    try:
        return (folder / HUNG).read_text(encoding="utf-8").strip() or None
    except OSError:
        return None
