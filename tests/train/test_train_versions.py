"""What a resume is refused for: any change of what computes, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from raysparse.train import versions

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The two packages and what a wheel is built from, without what Python compiled."""
    for name in ("raysparse", "analysis"):
        shutil.copytree(ROOT / name, tmp_path / "copy" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / "copy" / name)
    return tmp_path / "copy"


@pytest.mark.parametrize(
    "name",
    ["train/loop.py", "models/native/gru.h", "models/native/products.cpp", "metrics/extractors/glyph_cnn.safetensors"],
)
def test_the_code_is_another_where_anything_that_computes_is(copy: Path, name: str) -> None:
    assert versions.hash_of(copy / "raysparse") == versions.code_hash()
    (copy / "raysparse/__pycache__").mkdir()
    (copy / "raysparse/__pycache__/rng.pyc").touch()
    assert versions.hash_of(copy / "raysparse") == versions.code_hash()
    with (copy / "raysparse" / name).open("ab") as stream:
        stream.write(b"\n")
    assert versions.hash_of(copy / "raysparse") != versions.code_hash()


def test_a_wheel_has_the_code_of_the_clone(copy: Path) -> None:
    pytest.importorskip("setuptools")
    build = "from setuptools import build_meta; build_meta.build_wheel('built')"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True, timeout=120)
    (wheel,) = (copy / "built").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(copy / "installed")
    installed = copy / "installed/raysparse"
    assert versions.hash_of(installed) == versions.code_hash()
    assert not {path.suffix for path in installed.rglob("*") if path.is_file()} - versions.COMPUTES
