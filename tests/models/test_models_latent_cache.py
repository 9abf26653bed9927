"""benchmarks/latent_cache.py runs, and its GMACs are the paper's. Speed is its claim, not a test's."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

from raysparse.models import autoencoder, latent_unet

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/latent_cache.py"


def test_gmacs_are_the_papers() -> None:
    encoding, training = runpy.run_path(str(SCRIPT))["gmacs"](latent_unet.Config(), autoencoder.Config())
    assert round(encoding) == 155  # PAPER: 155 of (155 + 288)
    assert training == pytest.approx(3 * 1.92036e11 / 2 / 1e9, rel=1e-5)


def test_quick_run_times_both_steps(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(SCRIPT))["main"](["--quick", "--json", "--device", "cpu"])
    finally:
        torch.set_num_threads(threads)
    printed = json.loads(capsys.readouterr().out)
    assert set(printed["seconds"]) == {"online", "cached", "encode", "gather"}
    low, middle, high = printed["ratio"]
    assert 0 < low <= middle <= high
    assert printed["gmacs"]["ratio"] == pytest.approx(1 + printed["gmacs"]["encode"] / printed["gmacs"]["train"])
