"""What a result may depend on beside the settings."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch

import raysparse


def versions() -> dict[str, str | None]:
    """Package -> version, and the names of CPU and GPU; None: not there."""
    found: dict[str, str | None] = {"raysparse": raysparse.__version__, "python": platform.python_version()}
    for package in ("torch", "diffusers", "torch-fidelity", "numpy", "ray", "optuna"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["cpu"] = _cpu_name()
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return found


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
