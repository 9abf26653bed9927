from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from analysis import style, vector

PROGRAM = """
import sys, tempfile
from pathlib import Path
from analysis import vector_font
vector_font.register()
vector_font.register()
assert len(list(Path(tempfile.gettempdir()).glob("raysparse-font-*"))) == 1
"""


def fonts(text: str) -> set[str]:
    """That the PDF of a figure with this text brings along."""
    figure = style.figure(text, "FID").add_scatter(x=[0, 1], y=[0, 1], mode="lines")
    content = vector.files(vector.describe(figure))["pdf"]
    return {name.decode() for name in re.findall(rb"/FontName /[A-Z]{6}\+([\w-]+)", content)}


def test_all_that_the_report_says_comes_from_the_cut() -> None:
    assert fonts("S ≥ .5 − ΔTe · 10⁻³ ± σ × µ₀ → „é“ …") == {"RaysparseSans"}


def test_other_signs_come_from_the_whole_font() -> None:
    assert fonts("a snowman: ☃") == {"RaysparseSans", "DejaVuSans"}


def test_its_file_goes_with_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM], check=True)
    assert list(tmp_path.iterdir()) == []
