"""benchmarks/chirodiff_step.py runs, and its variants agree. Speed is its claim, not a test's."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/chirodiff_step.py"


@pytest.mark.usefixtures("compiler")
def test_quick_run_compares_all(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(SCRIPT))["main"](["--quick"])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "65,019 parameters" in printed
    found = re.search(r"loss (\S+), gradients (\S+)", printed)
    assert found is not None
    assert max(map(float, found.groups())) < 1e-5
    assert [line.split("  ")[1] for line in printed.splitlines()[-4:]] == [
        "nn.GRU padded",
        "nn.GRU packed",
        "packed GRU",
        "kernels",
    ]
