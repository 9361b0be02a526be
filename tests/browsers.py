"""Chromium without a window, driven by Selenium."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium.webdriver import Chrome, ChromeOptions, ChromeService

HOW_TO_INSTALL = "Debian, Ubuntu:  sudo apt-get install chromium-driver"
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # which root and containers cannot have; it opens nothing but pages of ours
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--no-proxy-server",
)


def find_browser() -> tuple[str, str] | None:
    """The programs of the browser and its driver."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


@contextmanager
def opened(browser: str, driver: str, folder: Path) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    chrome = Chrome(options, ChromeService(driver, log_output=str(folder / "chromedriver.txt")))
    try:
        yield chrome
    finally:
        chrome.quit()
