"""benchmarks/sweep_overhead.py runs, and measures what it says. How much it is, is its claim, not a test's."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from raysparse.space import Sweep

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/sweep_overhead.py"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sweep_overhead", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["sweep_overhead"] = module  # its dataclass asks for its own module
    spec.loader.exec_module(module)
    return module


def test_ratios_are_of_one_turn() -> None:
    module = script()
    turns = [
        module.Turn(2.0, 4.0, None, 10, 20, {"train_s": 1.0, "whole_s": 4.0, "peak_bytes": 10}),
        module.Turn(1.0, 4.0, 0.5, 30, 20, {"train_s": 1.0, "whole_s": 2.0, "peak_bytes": 20}),
    ]
    rows = {row["figure"]: row for row in module.table(turns, 100)}
    assert rows["steps/s, of training"]["ratio"] == [0.75, 0.5, 1.0]
    assert rows["steps/s, with the rest"]["ratio"] == [0.75, 0.5, 1.0]
    assert rows["steps/s, of training"]["sweep"] == [75.0, 50.0, 100.0]
    assert rows["next trial, s"] == {"figure": "next trial, s", "sweep": [0.5, 0.5, 0.5], "alone": None, "ratio": None}


def test_its_trials_differ_in_nothing_that_takes_time() -> None:
    sweep = script().sweep_of("quickstart", 5, 40, 20, None)
    assert sweep.grid == {
        "dense": {"optimizer.lr": (1e-3,)},
        "rigl": {"sparsity": (0.5,), "optimizer.lr": (1.001e-3, 1.002e-3, 1.003e-3, 1.004e-3)},
    }
    assert (sweep.search, sweep.asha, sweep.confirm, sweep.resources.max_concurrent) == (None, None, None, 1)


@pytest.mark.ray
@pytest.mark.slow
def test_a_tiny_measurement(sweep_of: Callable[..., Sweep], ray_home: Path) -> None:
    sweep = sweep_of(
        search=None,
        asha=None,
        confirm=None,
        grid={"static": {"sparsity": [0.5]}},
        resources={"max_concurrent": 1},
    )
    turns = script().measure(sweep, {"num_cpus": 1, "temp_dir": ray_home})
    assert [turn.next_s is None for turn in turns] == [True, False]
    for turn in turns:
        assert turn.whole_s > turn.train_s > 0
        assert turn.alone["whole_s"] > turn.alone["train_s"] > 0
        assert turn.peak_bytes > turn.pss_bytes > 10**7
        assert turn.next_s is None or turn.next_s > 0
