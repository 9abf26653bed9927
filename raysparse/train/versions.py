"""What a result may depend on beside the settings."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
from pathlib import Path

import torch

import raysparse
from raysparse import files

# The files that a result depends on; pyproject.toml packages them all, so that a clone and a wheel have one hash.
COMPUTES = frozenset({".py", ".cpp", ".h", ".safetensors", ".json", ".csv"})


def versions() -> dict[str, str | None]:
    """Package -> version, and the names of CPU and GPU; None: not there."""
    found: dict[str, str | None] = {"raysparse": raysparse.__version__, "python": platform.python_version()}
    for package in ("torch", "diffusers", "torch-fidelity", "numpy", "ray", "optuna"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["code"] = code_hash()
    found["cpu"] = _cpu_name()
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return found


@functools.cache
def code_hash() -> str:
    """Of raysparse's own source and data, which may change while its version does not: ten hex digits."""
    return hash_of(Path(raysparse.__file__).parent)


def hash_of(folder: Path) -> str:
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in COMPUTES):
        whole.update(f"{path.relative_to(folder)} {files.sha256(path)}\n".encode())
    return whole.hexdigest()[:10]


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
