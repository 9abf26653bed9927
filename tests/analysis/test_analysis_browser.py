"""The page in a real browser. Needs chromium (`apt-get install chromium`); without it these tests are skipped."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from synthetic_records import Folder, hostile

from analysis import report

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium here; install it to test the page in a browser")


def opened(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The document after its scripts ran, and what went to the console."""
    assert BROWSER
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--disable-dev-shm-usage", f"--user-data-dir={profile}", "--enable-logging=stderr",
        "--virtual-time-budget=20000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_every_figure_has_marks_and_the_console_is_silent(folder: Folder, tmp_path: Path) -> None:
    document, console = opened(report.write(hostile(folder).path), tmp_path / "profile")
    assert console == []
    figures = re.split(r'data-figure="', document)[1:]
    assert len(figures) >= 8
    for figure in figures:
        drawn = figure.split("</figure>")[0]
        assert 'class="main-svg"' in drawn
        assert re.search(r'<path class="(point|js-line)"', drawn)
    assert len(re.findall(r"<script", document)) == document.count("<script>") + 1


def test_a_script_that_is_not_the_pages_own_is_refused(folder: Folder, tmp_path: Path) -> None:
    page = report.write(hostile(folder).path)
    page.write_text(page.read_text().replace("</main>", "<script>document.title='run'</script></main>"))
    document, console = opened(page, tmp_path / "profile")
    assert "<title>run" not in document
    assert any("Content Security Policy" in line for line in console)
