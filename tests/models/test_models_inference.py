"""benchmarks/inference.py runs, and all its runtimes predict the same. Speed is its claim, not a test's."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/inference.py"


@pytest.mark.usefixtures("compiler")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_quick_run_compares_all_runtimes(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(SCRIPT))["main"](["--quick"])
    finally:
        torch.set_num_threads(threads)
    rows = [
        line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| chiro")
    ]
    assert [row[3] for row in rows] == [
        "dense",
        "dense kernel",
        "sparse",
        "torch.nn.utils.prune",
        "torch CSR",
        "scipy CSR",
    ]
    assert max(float(row[-1]) for row in rows) < 1e-4
    assert {row[7] for row in rows} == {"0.100"}
