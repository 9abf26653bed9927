"""benchmarks/training_gpu.py runs where there is neither Ray nor a GPU; speed is its claim, not a test's."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest
import torch
from bare_script import run

SCRIPT = "training_gpu.py"


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_quick_run_on_a_cpu(tmp_path: Path) -> None:
    done = run(SCRIPT, tmp_path, "--quick", "--device", "cpu", "--model", "uvit_large")
    assert done.returncode == 0, done.stderr
    assert "the times say nothing of a GPU" in done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("| uvit_large ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row for row in rows if row[4].startswith("unmeasured")] == []
    assert rows[0][1:4] == ["0", "", "dense + bf16 + compile + CUDA graphs"]
    assert float(rows[0][5]) == pytest.approx(1e3 / float(rows[0][4]), rel=0.01)
    kinds = collections.Counter(row[3].partition(" ")[0] for row in rows)
    assert kinds == {"dense": 4, "masked": 1, "sparse": 5, "topology": 2}
    assert all((float(row[7]) == 1) == (row[1] == "0") for row in rows)
    assert max(float(row[9]) for row in rows if row[9]) < 1e-5
    assert [row[3] for row in rows if not row[9]] == ["topology update (rigl)"] * 2


@pytest.mark.slow
def test_without_time_left_rows_say_so(tmp_path: Path) -> None:
    done = run(SCRIPT, tmp_path, "--quick", "--device", "cpu", "--seconds", "-1")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| uvit")]
    assert rows
    assert all("unmeasured: no time left" in row for row in rows)


def test_without_a_gpu_it_says_what_is_missing(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run(SCRIPT, tmp_path)
    assert done.returncode == 2
    assert "no CUDA device here; --device cpu --quick tries the benchmark" in done.stderr
