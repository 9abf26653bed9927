"""The page in a real browser, one session for all of these tests. Needs chromium: see browser.py."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, start, wait
from PIL import Image
from synthetic_records import Folder, fill_sweep, hostile

from analysis import report, vector

POINTS = """
    const place = document.querySelector(`[data-figure='${arguments[0]}']`);
    return Array.from(place.querySelectorAll('.scatterlayer .point')).length;
"""
ROWS = """
    const block = document.getElementById(arguments[0]);
    const rows = Array.from(block.querySelectorAll('tbody tr')).filter((row) => !row.hidden);
    return rows.map((row) => Array.from(row.cells, (cell) => cell.textContent));
"""
HEADINGS = "return Array.from(document.querySelectorAll(`#${arguments[0]} th`), (cell) => cell.textContent)"
COUNT = "return document.querySelector(`#${arguments[0]} .count`).textContent"
CLICK = "document.querySelector(arguments[0]).click()"
BOX = """
    const boxes = document.querySelectorAll(`input[data-filter='${arguments[0]}']`);
    Array.from(boxes).find((box) => box.parentElement.textContent === arguments[1]).click();
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    downloads = tmp_path_factory.mktemp("downloads")
    driver = start(downloads)
    yield Browser(driver, downloads)
    driver.quit()


def written(folder: Folder) -> Path:
    """The page of a folder's report; the figures' files, which take seconds, are left out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vector, "missing", lambda: "not today")
        return report.write(folder.path)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the small sweep."""
    return written(fill_sweep(Folder(tmp_path_factory.mktemp("sweep"))))


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(hostile(Folder(tmp_path_factory.mktemp("hostile"))))


def column(browser: Browser, part: str, heading: str) -> list[str]:
    """The shown cells of a column."""
    place = browser.run(HEADINGS, part).index(heading)
    return [row[place] for row in browser.run(ROWS, part)]


def records(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))


def test_every_figure_has_marks_nothing_is_asked_for_and_the_console_is_silent(
    browser: Browser, hostile_page: Path
) -> None:
    browser.open(hostile_page)
    names = browser.draw_all()
    assert len(names) >= 8
    browser.run("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    assert browser.console() == []
    asked = {address for address in browser.requests() if not address.startswith("data:")}
    assert asked == {hostile_page.as_uri()}


def test_figures_are_drawn_when_they_come_into_sight(browser: Browser, page: Path) -> None:
    browser.open(page)
    drawn = "return document.querySelector(`[data-figure='${arguments[0]}'] .main-svg`) !== null"
    scroll = "document.querySelector(`[data-figure='${arguments[0]}']`).scrollIntoView()"
    browser.run(scroll, "sparsity-0")
    browser.until(drawn, "sparsity-0")
    assert not browser.run(drawn, "timeline-0")
    browser.run(scroll, "timeline-0")
    browser.until(drawn, "timeline-0")


def test_hostile_names_stay_text(browser: Browser, hostile_page: Path) -> None:
    browser.open(hostile_page)
    browser.draw_all()
    script = "<script>alert(1)</script>"
    assert browser.run("return document.title").endswith("<script>alert(1)</script> · synthetic")
    assert script in column(browser, "main-1", "method")
    legend = "return Array.from(document.querySelectorAll('.legendtext'), (e) => e.textContent)"
    assert script in browser.run(legend)
    labels = browser.run("return Array.from(document.querySelectorAll('.filter label'), (e) => e.textContent)")
    assert script in labels
    assert browser.run("return document.querySelectorAll('script:not([type])').length") == 3
    images = browser.run("return Array.from(document.images, (e) => e.src.slice(0, 22))")
    assert set(images) == {"data:image/png;base64,"}


def test_a_script_that_is_not_the_pages_own_is_refused(browser: Browser, page: Path, tmp_path: Path) -> None:
    changed = tmp_path / "report.html"
    changed.write_text(page.read_text().replace("</main>", "<script>document.title='run'</script></main>"))
    browser.open(changed)
    assert browser.run("return document.title") != "run"
    assert any("Content Security Policy" in line for line in browser.console())
    browser.run("fetch('https://example.invalid/').catch(() => (window.refused = true))")
    browser.until("return window.refused")
    assert not any(address.startswith("https:") for address in browser.requests())
    browser.drain()


def test_the_filter_acts_on_figures_and_tables_together(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.draw_all()
    methods = set(column(browser, "main-0", "method"))
    assert methods == {"dense", "static", "magran", "rigl"}
    before = {name: browser.run(POINTS, name) for name in ("sparsity-0", "flops-0")}

    browser.run(BOX, "method", "rigl")
    assert set(column(browser, "main-0", "method")) == methods - {"rigl"}
    assert set(column(browser, "trials-0", "method")) == methods - {"rigl"}
    hidden = sum(row["method"] == "rigl" for row in records(page.parent / "trials.csv"))
    shown = len(records(page.parent / "trials.csv")) - hidden
    assert browser.run(COUNT, "trials-0") == f"{shown} of {shown + hidden} rows"
    browser.draw_all()
    for name, points in before.items():
        browser.until(f"return (() => {{ {POINTS} }})() < arguments[1]", name, points)

    browser.run(BOX, "S", "0.75")
    assert set(column(browser, "main-0", "S")) == {"0", "0.5"}  # dense is what all is measured against: it stays
    browser.run(CLICK, ".bar button")
    assert set(column(browser, "main-0", "method")) == methods
    browser.draw_all()
    for name, points in before.items():
        browser.until(f"return (() => {{ {POINTS} }})() === arguments[1]", name, points)


def test_filtered_figures_show_what_the_records_say(browser: Browser, page: Path) -> None:
    browser.open(page)
    for method in ("dense", "static", "magran"):
        browser.run(BOX, "method", method)
    browser.draw_all()
    data = browser.run(
        "return document.querySelector(\"[data-figure='flops-0']\").data.filter((trace) => trace.customdata)"
        ".map((trace) => Array.from(trace.y))"
    )
    left = {round(value, 6) for values in data for value in values}
    own = [row for row in records(page.parent / "main.csv") if row["method"] == "rigl" and row["fid_mean"]]
    assert left == {round(float(row["fid_mean"]), 6) for row in own}


def test_sorting_by_mouse_and_by_key(browser: Browser, page: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.open(page)
    at = browser.run(HEADINGS, "main-0").index("params active")
    cell = browser.driver.find_elements(By.CSS_SELECTOR, "#main-0 th")[at]
    came = column(browser, "main-0", "params active")
    numbers = [int(text.replace(",", "")) for text in came]
    assert numbers != sorted(numbers)

    browser.run("arguments[0].querySelector('button').click()", cell)
    assert cell.get_attribute("aria-sort") == "ascending"
    assert [int(text.replace(",", "")) for text in column(browser, "main-0", "params active")] == sorted(numbers)
    cell.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert cell.get_attribute("aria-sort") == "descending"
    shown = [int(text.replace(",", "")) for text in column(browser, "main-0", "params active")]
    assert shown == sorted(numbers, reverse=True)
    cell.find_element(By.TAG_NAME, "button").send_keys(Keys.SPACE)
    assert cell.get_attribute("aria-sort") is None
    assert column(browser, "main-0", "params active") == came


def is_whole(saved: Path) -> bool:
    """Chromium takes the name with an empty file, which the whole one then replaces."""
    return saved.is_file() and saved.stat().st_size > 0


def test_the_table_and_the_saved_csv_are_the_files(browser: Browser, page: Path) -> None:
    browser.open(page)
    for name in ("main", "trials", "stopped"):
        browser.run(CLICK, f"[data-csv='{name}']")
        saved = browser.downloads / f"{name}.csv"
        wait(partial(is_whole, saved), f"{saved} is saved")
        assert saved.read_bytes() == (page.parent / f"{name}.csv").read_bytes()
    assert not any(address.startswith("http") for address in browser.requests())

    rows = records(page.parent / "main.csv")
    spreads = [f" ± {float(row['fid_std']):.2f}" if row["fid_std"] else "" for row in rows]
    means = [f"{float(row['fid_mean']):.2f}{spread}" for row, spread in zip(rows, spreads, strict=True)]
    assert column(browser, "main-0", "FID (stroke_stats)") == means
    assert column(browser, "main-0", "params active") == [f"{int(row['params_active']):,}" for row in rows]
    trials = records(page.parent / "trials.csv")
    assert column(browser, "trials-0", "trial") == [row["trial_id"] for row in trials]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_phone_shows_it_without_overflow(browser: Browser, hostile_page: Path, dark: bool, tmp_path: Path) -> None:
    browser.open(hostile_page, width=375, dark=dark)
    browser.draw_all()
    browser.run("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    assert browser.run("return [document.documentElement.scrollWidth, window.innerWidth]") == [375, 375]
    wide = """
        const all = Array.from(document.querySelectorAll('main *'));
        return all.filter((each) => !each.closest('.scroll, pre, svg, .plot')
            && each.getBoundingClientRect().right > 376).map((each) => each.outerHTML.slice(0, 80));
    """
    assert browser.run(wide) == []
    browser.run("window.scrollTo(0, 0); document.querySelectorAll('details').forEach((each) => (each.open = false))")
    picture = Image.open(io.BytesIO(browser.screenshot(tmp_path / "phone.png"))).convert("L")
    light = sum(picture.histogram()[200:]) / (picture.width * picture.height)
    assert (light < 0.3) if dark else (light > 0.6)


def test_the_figures_follow_the_theme(browser: Browser, page: Path) -> None:
    def ink() -> Any:
        browser.draw_all()
        return browser.run("return document.querySelector(\"[data-figure='flops-0']\").layout.font.color")

    browser.open(page, dark=True)
    dark = ink()
    choose = "const choice = document.querySelector('.theme select'); choice.value = arguments[0];"
    choose += "choice.dispatchEvent(new Event('change'))"
    browser.run(choose, "light")
    light = ink()
    browser.run(choose, "auto")
    browser.media(dark=False)
    browser.until("return document.documentElement.dataset.theme === 'light'")
    assert (light, dark) == ("#1c2128", "#e4e7eb")


def test_print_has_all_figures_on_white(browser: Browser, page: Path) -> None:
    browser.open(page, dark=True)
    printed = browser.driver.execute_cdp_cmd("Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.69})["data"]
    assert len(printed) > 50_000
    count = "return document.querySelectorAll(arguments[0]).length"
    assert browser.run(count, "[data-figure] > .js-plotly-plot, [data-figure].js-plotly-plot") == browser.run(
        count, "[data-figure]"
    )
    browser.until("return document.documentElement.dataset.theme === 'dark'")  # afterwards as before


def test_keyboard_and_names(browser: Browser, page: Path) -> None:
    browser.open(page)
    unnamed = """
        const all = document.querySelectorAll("[role='img'], [role='region'], img, select, input, button");
        const named = (each) => each.getAttribute('aria-label') || each.alt || each.textContent.trim()
            || each.labels?.length || each.closest('.modebar');
        return Array.from(all).filter((each) => !named(each)).map((each) => each.outerHTML.slice(0, 100));
    """
    assert browser.run(unnamed) == []
    targets = browser.run(
        "return Array.from(document.querySelectorAll('a[href^=\"#\"]'), (e) => e.getAttribute('href'))"
    )
    assert browser.run("return arguments[0].filter((each) => !document.getElementById(each.slice(1)))", targets) == []
    ids = browser.run("return Array.from(document.querySelectorAll('main [id]'), (each) => each.id)")
    assert len(ids) == len(set(ids))


@pytest.mark.slow
def test_a_thousand_trials(browser: Browser, tmp_path: Path) -> None:
    from synthetic_records import many

    page = written(many(Folder(tmp_path), 1000, 100))
    assert page.stat().st_size < 20_000_000
    browser.open(page)
    browser.draw_all()
    assert browser.console() == []
    browser.run(BOX, "method", "static")
    browser.draw_all()
    assert browser.run(COUNT, "trials-0") == "750 of 1000 rows"
    browser.drain()
