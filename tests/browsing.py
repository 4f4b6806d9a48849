"""Report pages in a real browser, headless: Chromium and its driver, found on the machine."""

import json
import os
import shutil
from pathlib import Path
from typing import TypeAlias

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.wait import WebDriverWait

Browser: TypeAlias = webdriver.Chrome
PLOTS = "[...document.querySelectorAll('.plotly-graph-div')]"
REMEDY = (
    "needs Chromium and its driver: apt-get install chromium chromium-driver "
    "(or set SKIPPIPE_TEST_BROWSER and SKIPPIPE_TEST_DRIVER to the programs)"
)
ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,900",
)


def find(variable: str, *names: str) -> str:
    """Return the program that an environment variable or one of the names gives."""
    given = os.environ.get(variable)
    found = given or next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        pytest.skip(REMEDY)
    return found


def start_browser(folder: Path) -> Browser:
    """Start a browser that keeps its profile in `folder`; skip the test where there is none."""
    options = webdriver.ChromeOptions()
    options.binary_location = find("SKIPPIPE_TEST_BROWSER", "chromium", "chromium-browser", "google-chrome")
    for argument in (*ARGUMENTS, f"--user-data-dir={folder}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return Browser(service=Service(find("SKIPPIPE_TEST_DRIVER", "chromedriver")), options=options)


def open_page(browser: Browser, path: Path) -> None:
    """Open the page, wait until all is drawn, check that the console stays empty and nothing is loaded."""
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(path.as_uri())
    drawn = f"return {PLOTS}.every(plot => plot.querySelector('svg.main-svg'))"
    WebDriverWait(browser, 20).until(lambda driver: driver.execute_script(drawn))
    assert browser.execute_script(f"return {PLOTS}.length") > 0
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    # The browser itself may open pages of its own while it starts; only what this page asks for counts.
    requested = {request["request"]["url"] for request in requests if request["documentURL"] == path.as_uri()}
    assert {url for url in requested if not url.startswith("data:")} == {path.as_uri()}
