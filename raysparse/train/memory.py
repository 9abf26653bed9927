"""The most memory that a trial holds."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from pathlib import Path

import torch


def forget_peak(device: torch.device) -> None:
    """Let `peak_bytes` count from here on: the process may have trained other trials before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # no Linux, or one that forbids it
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """The most that this process has held since `forget_peak`: in tensors where the device is CUDA, else resident in
    the host's memory, what it held before included. Where the system forgets no peak, since the process began.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        return held("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def held(name: str) -> int:
    """Bytes. OSError: Linux does not say."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError(f"no {name} in /proc/self/status")
    return int(found[1]) * 1024
