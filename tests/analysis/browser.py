"""A headless chromium for the tests of the page: found, started and asked."""

from __future__ import annotations

import base64
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REQUIRED = "RAYSPARSE_BROWSER_REQUIRED"  # set by CI: there a missing browser is an error
HOW = "the page is tested in chromium: apt-get install chromium chromium-driver, pip install 'raysparse[test]'"
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--disable-component-update", "--no-first-run", "--hide-scrollbars", "--enable-unsafe-swiftshader",
)  # fmt: skip


def start(downloads: Path) -> Any:
    """A selenium driver that saves into `downloads`; skips the test, or fails it in CI, where there is no chromium."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not browser or not driver:
        (pytest.fail if os.environ.get(REQUIRED) else pytest.skip)(f"no browser here; {HOW}")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in FLAGS:
        options.add_argument(flag)
    prefs = {
        "download.default_directory": str(downloads),
        "profile.default_content_setting_values.automatic_downloads": 1,  # else only the first one without a question
    }
    options.add_experimental_option("prefs", prefs)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service(driver))


class Browser:
    """One session; `open` a page, then look at it."""

    def __init__(self, driver: Any, downloads: Path) -> None:
        self.driver = driver
        self.downloads = downloads

    def open(self, page: Path, width: int = 1200, dark: bool = False) -> None:
        """Load a page in a window of this width and wait until its script is through."""
        self.drain()
        self.media(dark)
        self.width(width)
        self.driver.get(page.as_uri())
        self.until("return document.documentElement.dataset.ready === ''")

    def run(self, script: str, *values: Any) -> Any:
        return self.driver.execute_script(script, *values)

    def until(self, script: str, *values: Any) -> Any:
        """Poll a script until what it returns is true. Bounded by 20 s."""
        return wait(lambda: self.run(script, *values), script)

    def width(self, pixels: int) -> None:
        settings = {"width": pixels, "height": 900, "deviceScaleFactor": 1, "mobile": pixels < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", settings)

    def media(self, dark: bool = False, kind: str = "") -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": kind, "features": [scheme]})

    def draw_all(self) -> list[str]:
        """Scroll to every figure until it is drawn; their names."""
        names = self.run("return Array.from(document.querySelectorAll('[data-figure]'), (e) => e.dataset.figure)")
        for name in names:
            self.run("document.querySelector(`[data-figure='${arguments[0]}']`).scrollIntoView()", name)
            self.until(DRAWN, name)
        return list(names)

    def screenshot(self, path: Path) -> bytes:
        taken = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"]
        path.write_bytes(base64.b64decode(taken))
        return path.read_bytes()

    def console(self) -> list[str]:
        """What went to the console since the last look; a favicon is no part of a page."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """The addresses asked for since the last look."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]

    def drain(self) -> None:
        self.console()
        self.requests()


MARKS = ".point, .js-line, .js-fill, .hm, canvas, .heatmaplayer image, .barlayer path"
DRAWN = f"""
    const place = document.querySelector(`[data-figure='${{arguments[0]}}']`);
    return !place.hasAttribute('aria-busy') && place.querySelector({MARKS!r}) !== null;
"""


def wait(condition: Callable[[], Any], what: str, seconds: float = 20) -> Any:
    """What `condition` returns once it is true; an error that names `what` where that never comes."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.05)
    return found
