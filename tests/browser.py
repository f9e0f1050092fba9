"""Chromium for tests of pages, driven by Selenium, with access to loopback and the disk only."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="no Chromium with its driver; on Debian: apt-get install chromium chromium-driver",
)


@contextmanager
def chromium(folder: Path) -> Iterator[Any]:
    """Yield a driver whose profile and downloads are in a folder."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    switches = "headless no-sandbox disable-gpu disable-dev-shm-usage disable-background-networking no-first-run"
    for switch in (
        *switches.split(),
        "disable-component-update",
        "disable-sync",
        f"user-data-dir={folder / 'profile'}",
    ):
        options.add_argument(f"--{switch}")
    # no host name is resolved, so that everything shown comes from the server or the disk
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
    driver.downloads = folder  # type: ignore[attr-defined]
    try:
        yield driver
    finally:
        driver.quit()


def emulate(
    browser: Any, width: int = 1280, height: int = 900, scheme: str = "light", motion: str = "no-preference"
) -> None:
    """Have a window of so many pixels, a colour scheme, and a preference of motion."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": motion}
    told = [{"name": name, "value": value} for name, value in features.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": told})


def flaws(browser: Any) -> list[str]:
    """Return the violations that axe-core finds: WCAG 2 A and AA, and its best practices."""
    # the package is for Playwright; only its copy of axe-core is used
    found = find_spec("axe_playwright_python")
    assert found is not None and found.submodule_search_locations
    (script,) = Path(found.submodule_search_locations[0]).rglob("axe.min.js")
    browser.execute_script(script.read_text(encoding="utf-8"))
    # preloading asks for files again, which a page from the disk may not
    result = browser.execute_async_script("axe.run({preload: false}).then(arguments[0])")
    assert len(result["passes"]) > 20
    return [f"{flaw['id']}: {[node['html'] for node in flaw['nodes']]}" for flaw in result["violations"]]


def complaints(browser: Any) -> list[str]:
    """Return what the browser has logged of violated policies and failed scripts since it was asked last."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["source"] in ("security", "javascript")]
