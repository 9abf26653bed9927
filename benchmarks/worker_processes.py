"""Processes that work side by side when told to, with or without a Multi-Process Service between them and a GPU.

A worker prints a number when it is ready, then one for each line that it was given: how much to do.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence

MPS_CONTROL = "nvidia-cuda-mps-control"


class Mps:
    """A Multi-Process Service that serves only processes with its environment."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mps")
        place = {f"CUDA_MPS_{kind}_DIRECTORY": self._folder.name for kind in ("PIPE", "LOG")}
        self.environment = os.environ | place
        subprocess.run([MPS_CONTROL, "-d"], env=self.environment, check=True)

    def end(self) -> None:
        subprocess.run([MPS_CONTROL], input="quit\n", text=True, env=self.environment, check=False, timeout=60)
        self._folder.cleanup()


class Processes:
    """So many of a command, each with its number as the last word."""

    def __init__(self, command: Sequence[str], count: int, mps: Mps | None = None) -> None:
        self.workers = [
            subprocess.Popen(
                [*command, str(number)],
                env=None if mps is None else mps.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(count)
        ]

    def ready(self) -> int:
        """Wait until all are; the sum of what they say."""
        return sum(self._answers())

    def run(self, work: int) -> None:
        """So much of each, together; waits for all."""
        for worker in self.workers:
            print(work, file=worker.stdin, flush=True)
        self._answers()

    def _answers(self) -> list[int]:
        lines = [output.readline() for worker in self.workers if (output := worker.stdout)]  # all have one: a pipe
        if not all(lines):
            self.end()
            raise RuntimeError("a worker process ended; what it said is above")
        return [int(line) for line in lines]

    def end(self) -> None:
        for worker in self.workers:
            worker.communicate()  # closes its input, which ends it
