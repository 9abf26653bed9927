"""Benchmarks run as on a machine with PyTorch and little else: a process that cannot import Ray and the like."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
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


def run(script: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Triton's kernels interpreted, no GPU seen."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", BARE, str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def run_kernels(file: str, folder: Path, **environment: str) -> str:
    """The tests of a file of tests/models in a process of their own, as triton reads its variables once. -> its output.

    AssertionError: one failed.
    """
    path = Path(__file__).parent / "models" / file
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(path)],
        env=os.environ | {"TRITON_CACHE_DIR": str(folder)} | environment,
        cwd=BENCHMARKS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
