"""Which CPU this is, and what it is good at."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from raysparse.models import _cpu

HERE = Path(__file__).parent
OF_KERNELS = [*sorted(HERE.glob("test_models_sparse_*.py")), HERE / "test_models_packed_gru.py"]


def test_without_proc_python_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(platform, "processor", lambda: "Intel64 Family 6, GenuineIntel")
    assert "GenuineIntel" in _cpu._described()


@pytest.mark.parametrize(
    ("flags", "speed"),
    [("avx512f avx512_bf16", 2.1), ("avx512_bf16 amx_bf16 amx_tile", 7.5), ("avx512f avx512_vnni", 1.0), ("", 1.0)],
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


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="no CPU of those instructions")
@pytest.mark.parametrize(("capability", "compiler"), [("avx2", ""), ("default", ""), ("avx2", "clang++")])
def test_kernels_for_other_cpus_and_by_other_compilers(capability: str, compiler: str) -> None:
    if compiler and not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    if capability == "avx2" and "avx2" not in _cpu._CPU:
        pytest.skip("a CPU without AVX2")
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_") and name != "CXX"}
    environment = ours | {"ATEN_CPU_CAPABILITY": capability} | ({"CXX": compiler} if compiler else {})

    def said(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            env=environment,
            cwd=HERE.parents[1],
            capture_output=True,
            text=True,
            check=False,
        )
        assert not done.returncode, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    taken = said("-c", "import torch; print(torch.backends.cpu.get_cpu_capability())").strip()
    assert taken == capability.upper()
    assert " passed" in said("-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *map(str, OF_KERNELS))
