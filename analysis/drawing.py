"""Many figures as files: half of them drawn by a second process, for drawing is what takes longest in a large report.

One process beside this one and not one per core: each weighs 150 MB, and a report has to fit into 1 GB. Not
multiprocessing, which would run the caller's main script again. `python -m analysis.drawing` is that process.
"""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import threading

from analysis import vector

Files = dict[str, bytes]  # format -> content
Figures = dict[str, vector.Description]


class Helper:
    """The second process; started early, so that its imports pass while this one still reads."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "analysis.drawing"], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def draw(self, figures: Figures) -> dict[str, Files]:
        """Every figure as SVG and PDF. What the helper did not bring (it was killed) is drawn here."""
        names = list(figures)
        theirs, found = names[1::2], {}
        answers: list[bytes] = []
        waiting = threading.Thread(target=self._ask, args=({name: figures[name] for name in theirs}, answers))
        waiting.start()
        try:
            found = {name: vector.files(figures[name]) for name in names[0::2]}
        finally:
            waiting.join()
        if answers and self._process.returncode == 0:
            found |= pickle.loads(answers[0])  # noqa: S301  of our own process, by a pipe
        return {name: found[name] if name in found else vector.files(figures[name]) for name in names}

    def _ask(self, figures: Figures, answers: list[bytes]) -> None:
        try:
            answers.append(self._process.communicate(pickle.dumps(figures))[0])
        except OSError:  # it is gone
            self._process.wait()

    def __enter__(self) -> Helper:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None and not stream.closed:
                stream.close()
        self._process.wait()


def _serve() -> None:
    importlib.import_module("matplotlib.backends.backend_pdf")  # while the other process still reads
    importlib.import_module("matplotlib.figure")
    figures: Figures = pickle.load(sys.stdin.buffer)  # noqa: S301  of the process that started this one, by a pipe
    sys.stdout.buffer.write(pickle.dumps({name: vector.files(figure) for name, figure in figures.items()}))


if __name__ == "__main__":
    _serve()
