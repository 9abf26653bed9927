"""The benchmarks of runtimes run, and their runtimes compute the same. Speed is no claim of a test."""

from __future__ import annotations

import gc
import runpy
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from benchmarks.peak_memory import Peak

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

pytestmark = pytest.mark.usefixtures("compiler")


def peaks() -> tuple[int | None, str, int | None]:
    torch.ones(2**22).sum()  # 16 MiB, freed again: to be counted where it is taken anew
    ring: list[object] = [torch.ones(2**23)]  # 32 MiB that only the collector frees: no part of what was held before
    ring.append(ring)
    del ring
    peak = Peak()
    gc.collect()
    kept = torch.ones(2**23)
    torch.ones(2**24).sum()
    found = peak.bytes(), peak.mib(), Peak().bytes()
    assert kept.all()
    return found


def test_a_peak_is_of_what_comes_after_its_start() -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as alone:  # what other tests' threads free would be missing
        found, shown, after = alone.submit(peaks).result()
    assert found is None or 95 < found / 2**20 < 110, "32 MiB, and 64 beside it for a while"
    assert shown == ("unmeasured" if found is None else f"{found / 2**20:.0f}")
    assert after is None or after < 2**20


def rows_of(script: str, capsys: pytest.CaptureFixture[str], *more: str) -> list[list[str]]:
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(BENCHMARKS / script))["main"](["--quick", *more])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out.splitlines()
    return [line.strip("| ").split(" | ") for line in printed if line.startswith(("| chirodiff", "| uvit", "| ddpm"))]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_quick_run_of_sampling_compares_all_runtimes(capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of("inference.py", capsys)
    names = ["dense", "dense kernel", "sparse", "torch.nn.utils.prune", "torch CSR", "scipy CSR"]
    assert [row[3] for row in rows] == names
    assert max(float(row[-1]) for row in rows) < 1e-5
    assert {row[7] for row in rows} == {"0.100"}
    assert all(row[8] == "unmeasured" or float(row[8]) >= 0 for row in rows)


def test_quick_run_of_training_compares_all_runtimes(capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of("training.py", capsys)
    names = ["dense", "masked", "sparse", "rigl", "torch.nn.utils.prune"]
    assert [row[3] for row in rows] == ["dense", "sparse", *names]
    assert {row[6] for row in rows if row[3] in ("sparse", "rigl")} == {"1.00", "0.10"}
    assert all(row[7] == "unmeasured" or float(row[7]) >= 0 for row in rows)  # these models take about 1 MiB
    assert max(float(row[-1]) for row in rows if row[3] == "sparse") < 1e-5


@pytest.mark.slow
def test_quick_run_of_sampling_pictures_compares_all_runtimes(capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of("inference_pictures.py", capsys)
    names = [(model, pattern) for model in ("uvit", "ddpm_unet") for pattern in ("element", "block", "diagonal")]
    assert [(row[0], row[2]) for row in rows[::3]] == names
    assert [row[3] for row in rows] == ["dense", "sparse", "torch.nn.utils.prune"] * 6
    assert max(float(row[-1]) for row in rows) < 1e-5
    assert all(" / " in row[6] for row in rows[1::3]), "each has sparse layers"


@pytest.mark.slow
def test_quick_run_of_training_pictures_compares_all_runtimes(capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of("training_pictures.py", capsys)
    assert [(row[0], row[2]) for row in rows[::3]] == [
        (model, pattern) for model in ("uvit", "ddpm_unet") for pattern in ("element", "diagonal")
    ]
    assert [row[3] for row in rows] == ["dense", "masked", "sparse"] * 4
    assert max(float(row[-1]) for row in rows if row[3] == "sparse") < 1e-5


@pytest.mark.slow
def test_under_autocast_float32_is_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    only = ("--bf16", "--model", "uvit")
    rows = rows_of("inference_pictures.py", capsys, *only, "--pattern", "element")
    assert [row[3] for row in rows] == ["dense", "sparse", "dense, fp32", "torch.nn.utils.prune"]
    assert 0 < float(rows[2][-1]) < 1e-2
    rows = rows_of("training_pictures.py", capsys, *only, "--updates")
    assert [row[3] for row in rows] == ["dense", "masked", "sparse", "update (rigl)", "dense, fp32"] * 2
    assert max(float(row[-1]) for row in rows if row[3] == "sparse") < 1e-1
