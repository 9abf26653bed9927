"""benchmarks/inference_gpu.py runs where there is neither Ray nor a GPU; speed is its claim, not a test's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bare_script import run

SCRIPT = "inference_gpu.py"


@pytest.mark.slow
def test_quick_run_on_a_cpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = run(SCRIPT, tmp_path, "--quick", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "the times say nothing of a GPU" in done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith(("| uvit", "| ddpm_unet", "| chirodiff"))]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[3] for row in rows[:3]] == ["torch.nn.GRU", "ours", "ours, bf16"]
    of_model = [
        *("dense, bf16, compiled, CUDA graphs", "dense, bf16, compiled", "dense, float32"),
        *["sparse"] * 2,
        *["sparse, not compiled"] * 2,
        "torch.nn.utils.prune",
    ]
    assert [row[3] for row in rows[3:]] == 2 * of_model
    unmeasured = [row for row in rows if row[4].startswith("unmeasured")]
    assert {(row[0], row[2], "2:4 is for bfloat16" in row[4]) for row in unmeasured} == {
        *[("uvit", "2:4", True), ("ddpm_unet", "2:4", True)],
        ("ddpm_unet", "block 64", False),  # so small that a block of each layer is more than S leaves
    }
    sparse = {(row[0], row[2]) for row in rows if row[3] == "sparse" and row not in unmeasured}
    assert sparse == {("uvit", "block 64")}
    assert max(float(row[-1]) for row in rows if row not in unmeasured) < 1e-5


@pytest.mark.slow
def test_without_time_left_rows_say_so(tmp_path: Path) -> None:
    done = run(SCRIPT, tmp_path, "--quick", "--device", "cpu", "--model", "chirodiff", "--seconds", "-1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("unmeasured: no time left") == 3


def test_without_a_gpu_it_says_what_is_missing(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run(SCRIPT, tmp_path)
    assert done.returncode == 2
    assert "no CUDA device here; --device cpu --quick tries the benchmark" in done.stderr
