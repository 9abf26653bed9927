"""Which CPU this is, and what it is good at."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from raysparse.models import _cpu


def test_without_proc_python_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(platform, "processor", lambda: "Intel64 Family 6, GenuineIntel")
    assert "GenuineIntel" in _cpu._described()


@pytest.mark.parametrize(
    ("flags", "speed"),
    [("avx512f avx512_bf16", 2.1), ("avx512_bf16 amx_bf16 amx_tile", 6.0), ("avx512f avx512_vnni", 1.0), ("", 1.0)],
)
def test_bfloat16_is_faster_where_the_cpu_has_instructions_for_it(flags: str, speed: float) -> None:
    assert _cpu._bfloat16(f"vendor_id : GenuineIntel\nflags : {flags}\n") == speed


def test_dense_products_are_as_fast_as_the_type_that_they_are_made_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cpu, "BFLOAT16", 3.0)
    assert _cpu.dense_speed() == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert _cpu.dense_speed() == 3
        with torch.autocast("cpu", enabled=False):
            assert _cpu.dense_speed() == 1
    with torch.autocast("cpu", torch.float16):
        assert _cpu.dense_speed() == 1
