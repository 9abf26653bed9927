"""benchmarks/unet_step.py runs where there is no Ray, and counts what it claims. Speed is its claim, not a test's."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from bare_script import run

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/unet_step.py"


@pytest.mark.slow
def test_quick_run_without_ray_compiles_once_whatever_the_topology_does(tmp_path: Path) -> None:
    done = run("unet_step.py", tmp_path, "--quick", "--json", "--backend", "eager", "--threads", "1")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    dense, rigl, compiled = printed["rows"]
    assert [row["variant"] for row in printed["rows"]] == ["dense", "rigl", "rigl + compile"]
    assert compiled["topology_updates"] >= 2
    assert compiled["compilations"] == 1
    assert (dense["density"], round(rigl["density"], 4)) == (1, 0.5)
    assert dense["to_dense"] == [1, 1, 1]
    # Masks are a bool and a byte for each of most weights, which are 16 bytes with gradient and moments.
    masks = rigl["state_bytes"] - dense["state_bytes"]
    assert 1.8 * printed["parameters"] < masks <= 2 * printed["parameters"]
    assert dense["state_bytes"] >= 12 * printed["parameters"]
    assert rigl["peak_bytes"] > dense["peak_bytes"] > dense["state_bytes"] + 4 * printed["parameters"]


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")  # of PyTorch 2.11
def test_peak_memory_is_what_is_alive_at_once() -> None:
    def allocate() -> None:
        for _ in range(3):
            one = torch.zeros(2**18)
            del one
        a, b = torch.zeros(2**18), torch.zeros(2**18)
        del a, b

    assert runpy.run_path(str(SCRIPT))["peak_of"](allocate, torch.device("cpu")) == 2 * 4 * 2**18
