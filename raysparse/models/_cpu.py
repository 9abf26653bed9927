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
# "intel": a Xeon with AVX-512; "amd": an EPYC of Zen 4 with AVX-512; "narrow": without it, measured on that EPYC too.
# Dense products are twice as fast on the Xeon, for they are limited by products, and zero-skipping by loads.
KIND = ("intel" if INTEL else "amd") if AVX512 else "narrow"
