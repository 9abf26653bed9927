"""Ctrl-C and SIGTERM while a sweep runs: the first one asks the trials to save themselves, the second ends at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Signals:
    """Whether Ctrl-C or SIGTERM came. A second one ends the process at once with 130, and Ray's processes with it."""

    def __init__(self) -> None:
        self._number: int | None = None

    def came(self) -> bool:
        return self._number is not None

    def catch(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self.came():
            os._exit(130)
        self._number = number


@contextmanager
def caught() -> Iterator[Signals]:
    """Signals caught in this block; afterwards they do what they did before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signals = Signals()
    signals.catch()
    try:
        yield signals
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
