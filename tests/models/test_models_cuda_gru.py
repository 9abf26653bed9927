"""The kernels of a GRU's recurrence, interpreted or on a GPU, and what they serve."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from bare_script import run_kernels

from raysparse.models import _cuda_gru, chirodiff

FILE = "triton_gru.py"


@pytest.mark.slow
def test_interpreted_it_computes_what_nn_gru_does(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    assert "11 passed, 3 skipped" in run_kernels(FILE, tmp_path, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@pytest.mark.timeout(900)  # some hundred kernels are compiled first
def test_on_a_gpu_it_does_too(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert "14 passed" in run_kernels(FILE, tmp_path)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ["_forward", "_backward"])
def test_at_the_widest_it_fits_a_multiprocessor(
    name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tensor cores, in the shared memory that is asked for; which needs no device."""
    triton = pytest.importorskip("triton")
    compiler, backends = (importlib.import_module(f"triton.{part}") for part in ("compiler", "backends.compiler"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = _cuda_gru.kernels()
    assert kernels is not None
    constants = kernels._constants(128, _cuda_gru.ROWS, True)
    options = {"num_stages": constants.pop("num_stages"), "num_warps": kernels._WARPS}
    constants |= {"KEEP": True} if name == "_forward" else {}
    kernel = getattr(kernels, name)
    kinds = (
        {"lengths": "*i32"}
        | dict.fromkeys(("batch", "points", "hidden"), "i32")
        | dict.fromkeys(constants, "constexpr")
    )
    source = compiler.ASTSource(
        fn=kernel, signature={key: kinds.get(key, f"*{dtype}") for key in kernel.arg_names}, constexprs=constants
    )
    made = triton.compile(source, target=backends.GPUTarget("cuda", 90, 32), options=options)
    assert "mma.sync" in made.asm["ptx"]
    assert made.metadata.shared <= kernels.shared_bytes(128, 2 if dtype == "bf16" else 4)


def test_a_cpu_and_a_wider_model_are_not_served() -> None:
    pytest.importorskip("triton")
    kernels = _cuda_gru.kernels()
    assert kernels is not None
    assert not _cuda_gru.serves(torch.zeros(1), torch.zeros(24, 8))
    assert kernels.shared_bytes(128, 4) < 227 * 1024 < kernels.shared_bytes(129, 2)
    assert not chirodiff.build(chirodiff.Config(hidden=8), seed=0).gru.takes_padded(torch.zeros(1))


def test_without_triton_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "raysparse.models._triton_gru", raising=False)
    _cuda_gru.kernels.cache_clear()
    try:
        assert _cuda_gru.kernels() is None
    finally:
        _cuda_gru.kernels.cache_clear()
