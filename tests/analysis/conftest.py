"""Results folders for the analysis; what is in them: synthetic_records.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_records import Folder, fill_sweep


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """An empty results folder."""
    return Folder(tmp_path / "results")


@pytest.fixture
def sweep(folder: Folder) -> Folder:
    """A finished sweep: synthetic_records.fill_sweep."""
    return fill_sweep(folder)
