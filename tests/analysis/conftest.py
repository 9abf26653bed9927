"""Results folders for the analysis; what is in them: synthetic_records.py, synthetic_grid.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_grid import evaluated, fill_grid, fill_two_budgets
from synthetic_records import Folder, fill_sweep

from analysis.load import read
from analysis.sections import Section, split


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """An empty results folder."""
    return Folder(tmp_path / "results")


@pytest.fixture
def sweep(folder: Folder) -> Folder:
    """A finished sweep: synthetic_records.fill_sweep."""
    return fill_sweep(folder)


@pytest.fixture(scope="session")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Section:
    """The grid of synthetic_grid.py, evaluated at 25 and 100 steps too. Not to be written to."""
    folder = fill_grid(Folder(tmp_path_factory.mktemp("grid")))
    evaluated(folder, 25, 2.0)
    evaluated(folder, 100, 0.5)
    evaluated(folder, 100, 0.1, eta=1.0)
    (section,) = split(read(folder.path))
    return section


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Section:
    """The section of synthetic_records.fill_sweep. Not to be written to."""
    (section,) = split(read(fill_sweep(Folder(tmp_path_factory.mktemp("sweep"))).path))
    return section


@pytest.fixture(scope="session")
def two_budgets(tmp_path_factory: pytest.TempPathFactory) -> Section:
    """The section of synthetic_grid.fill_two_budgets. Not to be written to."""
    (section,) = split(read(fill_two_budgets(Folder(tmp_path_factory.mktemp("budgets"))).path))
    return section
