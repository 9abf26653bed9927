"""benchmarks/inference_gpu.py runs where there is neither Ray nor a GPU; speed is its claim, not a test's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/inference_gpu.py"
ABSENT = (
    *("ray", "optuna", "pyarrow", "pandas", "scipy", "torch_fidelity", "torchvision", "plotly", "matplotlib"),
    *("typer", "rich", "tensorboard", "HersheyFonts"),
)
BARE = f"""
import runpy, sys
for name in {ABSENT}:
    sys.modules[name] = None  # importing it fails, as where it is not installed
sys.path = [path for path in sys.path if path]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", BARE, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_quick_run_on_a_cpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = run(tmp_path, "--quick", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "the times say nothing of a GPU" in done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith(("| uvit", "| ddpm_unet", "| chirodiff"))]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[3] for row in rows[:2]] == ["torch.nn.GRU", "ours"]
    of_model = [
        *("dense, bf16, compiled, CUDA graphs", "dense, bf16, compiled", "dense, float32"),
        *["sparse"] * 3,
        *["sparse, not compiled"] * 3,
        "torch.nn.utils.prune",
    ]
    assert [row[3] for row in rows[2:]] == 2 * of_model
    unmeasured = [row for row in rows if row[4].startswith("unmeasured")]
    assert {(row[2], "2:4 is for bfloat16" in row[4]) for row in unmeasured} == {("2:4", True)}
    assert {row[2] for row in rows if row[3] == "sparse" and row not in unmeasured} == {"block 16", "diagonal"}
    assert max(float(row[-1]) for row in rows if row not in unmeasured) < 1e-5


@pytest.mark.slow
def test_without_time_left_rows_say_so(tmp_path: Path) -> None:
    done = run(tmp_path, "--quick", "--device", "cpu", "--model", "chirodiff", "--seconds", "-1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("unmeasured: no time left") == 2


def test_without_a_gpu_it_says_what_is_missing(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run(tmp_path)
    assert done.returncode == 2
    assert "no CUDA device here; --device cpu --quick tries the benchmark" in done.stderr
