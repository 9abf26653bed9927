"""What the tests of prepared pictures share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_pictures import SIDE

from raysparse.data import class_folders


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 pictures: 90 for training in three shards, 10 for validation."""
    return class_folders.draw_tiny(tmp_path_factory.mktemp("pictures"), ("a", "b"), 50, size_px=SIDE)
