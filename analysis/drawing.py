"""Many figures as files: most are drawn by a second process, for drawing is what takes longest in a large report.

It draws each as it is found, while this one still reads and counts; then both draw what is left, from either end. One
process beside this one and not one per core: each weighs 150 MB, and a report has to fit into 1 GB. Not
multiprocessing, which would run the caller's main script again. `python -m analysis.drawing` is that process.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pickle
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator

from analysis import vector

Files = dict[str, bytes]  # format -> content
Figures = dict[str, vector.Description]


@contextlib.contextmanager
def helper() -> Iterator[Helper | None]:
    """The second process, to be started before anything is read; None where matplotlib is not installed."""
    with contextlib.nullcontext() if vector.missing() else Helper() as started:
        yield started


class Helper:
    """The second process; started early, so that its imports pass while this one still reads."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "analysis.drawing"], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._figures: Figures = {}
        self._left: deque[str] = deque()
        self._found: dict[str, Files] = {}
        self._more = threading.Semaphore(0)  # one for each figure that was added, and one for the end
        self._feeding = threading.Thread(target=self._feed, daemon=True)
        self._feeding.start()

    def add(self, name: str, figure: vector.Description) -> None:
        """One more to draw."""
        self._figures[name] = figure
        self._left.append(name)
        self._more.release()

    def finish(self) -> dict[str, Files]:
        """All that were added as SVG and PDF, in that order. What the helper did not bring is drawn here."""
        self._more.release()
        while self._left:
            try:
                name = self._left.pop()
            except IndexError:  # the helper has just taken the last one
                break
            self._found[name] = vector.files(self._figures[name])
        self._feeding.join()
        return {
            name: self._found[name] if name in self._found else vector.files(figure)
            for name, figure in self._figures.items()
        }

    def _feed(self) -> None:
        """Hand over one figure after the other, from the first, until none is left; in a thread of its own."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        while self._more.acquire():
            try:
                name = self._left.popleft()
            except IndexError:
                return
            try:
                pickle.dump(self._figures[name], self._process.stdin)
                self._process.stdin.flush()
                self._found[name] = pickle.load(self._process.stdout)  # noqa: S301  of our own process, by a pipe
            except (OSError, EOFError, ValueError, pickle.UnpicklingError):  # it is gone
                return

    def __enter__(self) -> Helper:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if not self._figures:  # a mistake was found while it was still starting
            self._process.kill()
        with contextlib.suppress(BrokenPipeError):  # it was killed, with a figure under way
            self._process.stdin.close()  # the sign to end, which lets it remove its files
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def _serve() -> None:
    importlib.import_module("matplotlib.backends.backend_pdf")  # while the other process still reads
    importlib.import_module("matplotlib.figure")
    while True:
        try:
            figure: vector.Description = pickle.load(sys.stdin.buffer)  # noqa: S301  of what started this, by a pipe
        except EOFError:
            gc.freeze()  # .3 s less to end, for which the report waits
            return
        pickle.dump(vector.files(figure), sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve()
