"""benchmarks/products_gpu.py runs without Ray, at small size and interpreted. Speed is not tested."""

from __future__ import annotations

from pathlib import Path

import pytest
from bare_script import run

SCRIPT = "products_gpu.py"


@pytest.mark.slow
def test_quick_run_on_a_cpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = run(SCRIPT, tmp_path, "--quick", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| 256 x 128 ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    kinds = {(row[1], row[3]) for row in rows if not row[4].startswith("unmeasured")}
    assert kinds == {(f"block {edge}", what) for edge in (64, 32, 16) for what in ("sampling", "training")}
    (row,) = (row for row in rows if row[4].startswith("unmeasured"))
    assert row[1] == "2:4"
