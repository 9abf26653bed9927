"""Which of the CPUs that were measured this one is: what pays on one takes longer on another."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def _vendor() -> str:
    """What names the maker of this machine's CPU."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not on Linux
        return platform.processor()


INTEL = "GenuineIntel" in _vendor()
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
# "intel": a Xeon with AVX-512; "amd": an EPYC of Zen 4 with AVX-512; "narrow": all without it, measured on that EPYC.
# Skipping half of the weights makes a linear layer of 512 x 1,536 1.1, 1.5 and 1.0 times as fast on them.
KIND = ("intel" if INTEL else "amd") if AVX512 else "narrow"
