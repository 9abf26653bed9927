"""The most memory that something needs, beside what the process held before."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from raysparse.train.memory import held

T = TypeVar("T")


class Peak:
    """Counts from here on: a GPU's tensors, or what this process holds of the machine's memory, where Linux tells."""

    def __init__(self, device: str = "cpu") -> None:
        self._gpu = device == "cuda"
        gc.collect()  # else what waits for the collector is counted now, freed later, and missing from the peak
        if self._gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._before: int | None = torch.cuda.memory_allocated()
            return
        with contextlib.suppress(OSError, AttributeError):  # no glibc
            ctypes.CDLL(None).malloc_trim(0)  # else memory that was freed before is taken again, uncounted
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._before = held("VmRSS")
        except OSError:
            self._before = None

    def bytes(self) -> int | None:
        """The most until now. None: not known."""
        if self._before is None:
            return None
        return (torch.cuda.max_memory_allocated() if self._gpu else held("VmHWM")) - self._before

    def mib(self) -> str:
        found = self.bytes()
        return "unmeasured" if found is None else f"{found / 2**20:.0f}"


def made(makers: Mapping[str, Callable[[], T]], use: Callable[[T], object]) -> tuple[dict[str, T], dict[str, str]]:
    """What each maker makes, and the MiB that it takes at its peak, made and used once."""
    for make in makers.values():
        use(make())  # what libraries take once is nobody's
    found, memory = dict[str, T](), dict[str, str]()
    for name, make in makers.items():
        peak = Peak()
        found[name] = make()
        use(found[name])
        memory[name] = peak.mib()
    return found, memory
