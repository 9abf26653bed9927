"""The report of a large sweep: seconds and memory to write it, seconds until its page answers in chromium.

    python benchmarks/report_page.py [--trials 1000] [--reports 100]

The records are synthetic (tests/analysis/synthetic_records.py). Written by the plain command in a process of its own.
The page's clock starts with the navigation and stops when its script is through and the figures in sight are drawn,
then again when a filter has acted on all tables and on what is in sight. The median of five loads.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "analysis")]

from browser import Browser, start  # noqa: E402
from synthetic_records import Folder, fill_sweep, many  # noqa: E402

IN_SIGHT = """
    const seen = (each) => each.getBoundingClientRect().top < innerHeight && each.getBoundingClientRect().bottom > 0;
    const busy = Array.from(document.querySelectorAll('[data-figure]')).filter(seen)
        .some((each) => each.hasAttribute('aria-busy'));
    return document.documentElement.dataset.ready === '' && !busy;
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--reports", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = many(fill_sweep(Folder(Path(folder) / "results")), options.trials, options.reports).path
        begun = time.perf_counter()
        command = [sys.executable, "-m", "analysis", str(results)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        wall = time.perf_counter() - begun
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        page = results / "report" / "report.html"
        figures = len(list((page.parent / "figures").glob("*.pdf")))
        print(f"written: {wall:.1f} s ({used.ru_utime:.1f} s of CPU), {used.ru_maxrss / 2**20:.2f} GiB at most")
        print(f"         page of {page.stat().st_size / 1e6:.1f} MB, {figures} figures as SVG and PDF")
        opened, filtered = _page(page, Path(folder))
    print(f"page:    interactive after {opened:.2f} s, filtered after {filtered:.2f} s more (median of 5)")


def _page(page: Path, downloads: Path) -> tuple[float, float]:
    driver = start(downloads)
    try:
        browser = Browser(driver, downloads)
        opened, filtered = [], []
        for _ in range(5):
            browser.width(1200)
            begun = time.perf_counter()
            browser.driver.get(page.as_uri())
            browser.until(IN_SIGHT)
            opened.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            browser.run("document.querySelector(\"input[data-filter='method']\").click()")
            browser.until(IN_SIGHT)
            filtered.append(time.perf_counter() - begun)
    finally:
        driver.quit()
    return statistics.median(opened), statistics.median(filtered)


if __name__ == "__main__":
    main()
