"""What several test folders share."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported: the suite shares few cores with Ray's processes, and one thread makes sums repeatable.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def kanjivg_path() -> Path:
    """The real KanjiVG sketches where they are at hand: $RAYSPARSE_KANJIVG, or beside the checkout."""
    path = Path(os.environ.get("RAYSPARSE_KANJIVG", ROOT.parent / "shared/data/kanjivg/kanji.rdp100.npz"))
    if not path.is_file():
        pytest.skip("no kanji.rdp100.npz here; set RAYSPARSE_KANJIVG to its path to run this test")
    return path
