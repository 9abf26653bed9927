"""Which of the CPUs that were measured this one is: what pays on one takes longer on another."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def _described() -> str:
    """What names the maker of this machine's CPU, and what it can."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not on Linux
        return platform.processor()


_CPU = _described()
INTEL = "GenuineIntel" in _CPU
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
# "intel": a Xeon with AVX-512; "amd": an EPYC of Zen 4 with AVX-512; "narrow": all without it, measured on that EPYC.
# Skipping half of the weights makes a linear layer of 512 x 1,536 1.1, 1.5 and 1.0 times as fast on them.
KIND = ("intel" if INTEL else "amd") if AVX512 else "narrow"


def _bfloat16(described: str) -> float:
    """How many times as fast a dense product is in bfloat16 as in float32, by the CPU's instructions for it.

    On the EPYC (avx512_bf16) linear layers of 512 x 512 to 2,048 x 512 1.85 to 2.7, convolutions of 128 and 256
    channels 1.9. On a Xeon with AMX linear layers of 256 x 256 to 512 x 2,048 3.4 to 7.6, convolutions of 128 to 512
    channels 2.3 to 4.8: the most, so that no layer gets slower.
    """
    return 7.5 if "amx_bf16" in described else 2.1 if "avx512_bf16" in described else 1.0


BFLOAT16 = _bfloat16(_CPU)
VDPBF16PS = AVX512 and "avx512_bf16" in _CPU
# On a Xeon 512 x 1,536 at density .1 takes 9.5 ms by pairs, 6.5 in float32, 3.2 dense in bfloat16.
PAIRS = VDPBF16PS and not INTEL


def halved() -> bool:
    """Whether what is made here computes in bfloat16, by autocast."""
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


def dense_speed() -> float:
    """How many times as fast as in float32 a dense product is that is made here."""
    return BFLOAT16 if halved() else 1.0
