"""benchmarks/fid.py runs, also where PyTorch is and little else, and counts what it claims. Speed is its claim."""

from __future__ import annotations

import argparse
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bare_script import run

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/fid.py"


def rows_of(printed: str) -> list[dict[str, str]]:
    head, _, *lines = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")]
    return [dict(zip(head, line, strict=True)) for line in lines]


@pytest.fixture(scope="module")
def quick() -> str:
    """What a run prints."""
    done = subprocess.run([sys.executable, str(SCRIPT), "--quick", "--cpu-time"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_quick_run_measures_each_runtime_and_precision(quick: str) -> None:
    rows = rows_of(quick)
    kinds = [("0", "dense", "fp32"), ("0", "auto", "fp32"), ("0", "dense", "bf16")]
    kinds += [("0.5", "dense", "fp32"), ("0.5", "sparse", "fp32")]
    assert [(row["S"], row["runtime"], row["precision"]) for row in rows[:-1:2]] == kinds
    assert rows[-1]["precision"] == "bf16, GRU too"
    assert [row["protocol"] for row in rows[:-1]] == ["400 x 4", "384 x 2"] * 5
    assert [row["FLOPs"] for row in rows[:-1:2]] == ["1", "1", "1", "1", "0.5"]
    for full, early in zip(rows[:-1:2], rows[1:-1:2], strict=True):
        # Sampling is scaled by samples x steps from one measurement; its median scales as it does.
        assert float(full["sampling s"]) == pytest.approx(float(early["sampling s"]) * 800 / 384, abs=0.002)
        parts = ("validation s", "sampling s", "drawing + extraction s", "FID s", "KID s")
        assert sum(float(full[name]) for name in parts) == pytest.approx(float(full["evaluation s"]), abs=0.01)
        assert float(early["KID s"]) == 0
        shares = [[float(share.rstrip("% ")) for share in row["share of a trial"].split("/")] for row in (early, full)]
        assert all(0 < one <= other < 100 for one, other in zip(*shares, strict=True))
        assert shares[1] == sorted(shares[1])
    for row in (rows[0], rows[4], rows[-1]):
        assert float(row["FID"].split(" ± ")[0]) > 0
    assert float(rows[4]["minus fp32, same noise"].split(" ± ")[0]) != 0
    assert "on a GPU: unmeasured" in quick


@pytest.mark.parametrize(("device", "steps"), [("cpu", 1), ("cuda", 10)])
def test_a_gpus_step_is_one_of_several_that_it_was_given_ahead(device: str, steps: int) -> None:
    done: list[int] = []
    runner = SimpleNamespace(device=torch.device(device), train=done.append, _wait=lambda: None)
    step_s = runpy.run_path(str(SCRIPT))["Runner"].step_s
    assert step_s(runner, lambda: 3.0 * sum(done)) == 3.0
    assert done == [2, steps]


def test_the_share_of_a_trial_by_hand() -> None:
    options = argparse.Namespace(trial_steps=100, every=30)  # at 30, 60, 90 and 100
    share = runpy.run_path(str(SCRIPT))["share"]
    full, early = [0.5, 4.0, 0.2, 0.2, 0.1], [0.5, 0.1, 0.1, 0.05, 0.0]
    assert share(options, 0.1, full, None) == pytest.approx(20 / 30)
    # Four early ones, and the full one at the end, whose validation loss is the early one's.
    assert share(options, 0.1, full, early) == pytest.approx(7.5 / 17.5)


def test_what_samples_is_as_sparse_as_what_trains() -> None:
    script = runpy.run_path(str(SCRIPT.with_name("fid_trial.py")))
    options = argparse.Namespace(hidden=8, layers=1, threads=1, batch_size=4, batch=4, kid_subsets=1)
    data = script["Data"](script["doodles"]("train", 16), None, None, None)
    runner = script["Runner"](script["trial"](options, sparse={"method": "static", "sparsity": 0.5}), data, "cpu")
    runner.train(2)
    shadow = dict(runner.average.named_parameters())
    zeros = sum(int((shadow[name] == 0).sum()) for name in runner.engine.masks)
    assert zeros >= sum(int((~mask).sum()) for mask in runner.engine.masks.values()) > 0


def test_how_well_a_protocol_ranks_by_hand() -> None:
    script = runpy.run_path(str(SCRIPT.with_name("intermediate_fid.py")))
    final = [10.0, 20.0, 30.0, 40.0]
    middle, end = [3.0, 1.0, 2.0, 4.0], [2.0, 1.0, 3.0, 4.0]  # two and one pairs the wrong way round
    protocols = [(n, steps) for n in script["SAMPLES"] for steps in script["DDIM_STEPS"]]
    measured = []
    for trial, fid in enumerate(final):
        at = [{(*one, seed): of[trial] + seed for one in protocols for seed in (0, 1)} for of in (middle, end)]
        measured.append((at[0], at[1] | {(2000, 50, 0): fid}))
    rows = {row[0]: row[1:] for row in script["table"](argparse.Namespace(full=2000), measured)}
    assert rows["500 x 20"] == ["0.1000", "0.80 and 0.80", "0.40 and 0.40", "0.548", "0 of 2"]


@pytest.mark.slow
def test_without_ray_or_scipy_it_measures_the_same_fids(quick: str, tmp_path: Path) -> None:
    done = run("fid.py", tmp_path, "--quick", "--cpu-time")
    assert done.returncode == 0, done.stderr
    assert [row["FID"] for row in rows_of(done.stdout)] == [row["FID"] for row in rows_of(quick)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--device", "cuda"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
