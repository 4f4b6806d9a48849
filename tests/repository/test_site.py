"""The documentation site, and the pages that are made from the program."""

import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from browsing import Browser
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

import skippipe
import skippipe_scheduler

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "docs" / "tools"
SITE = ROOT / "build" / "site"
SEARCH = "[...document.querySelectorAll('div')].find(element => element.shadowRoot)?.shadowRoot"
"""The dialog of the search, whose parts are hidden from the page around it."""


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, TOOLS / program, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_generated_pages_are_up_to_date() -> None:
    """Renew them with: python docs/tools/generate.py."""
    result = run("generate.py", "--check")
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def site() -> Path:
    """The site, built with all its checks: links, anchors and names that lead nowhere end the build.

    Two processes of one run of the tests may want it: the first one builds it, and the other one waits.
    """
    run_id, built = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid())), SITE.with_name("site-of-run")
    SITE.parent.mkdir(exist_ok=True)
    with SITE.with_name("site.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists() or built.read_text() != run_id:
            result = run("build_site.py")
            assert result.returncode == 0, result.stdout + result.stderr
            built.write_text(run_id)
    return SITE


@pytest.mark.parametrize("package", [skippipe, skippipe_scheduler], ids=lambda package: package.__name__)
def test_every_public_name_has_its_entry(site: Path, package: object) -> None:
    name = package.__name__  # type: ignore[attr-defined]  # a module's own
    page = (site / "api" / f"{name}.html").read_text()
    found = set(re.findall(rf'id="{name}\.(\w+)"', page))
    assert set(package.__all__) - found == set()  # type: ignore[attr-defined]  # a module's own


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"[\w/-]+\.md", yaml.safe_dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])))
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert pages - listed == set()


def test_links_out_of_docs_lead_to_copies(site: Path) -> None:
    assert 'href="benchmarks/index.html#compressed-traffic"' in (site / "speed.html").read_text()
    assert 'src="routes.svg"' in (site / "index.html").read_text()
    assert (site / "benchmarks" / "skip_tolerance" / "results.html").exists()


def search_is_open(browser: Browser) -> bool:
    """Whether the search takes text; opens it where it does not, which works once the page's scripts have run."""
    if browser.execute_script(f"return {SEARCH}?.activeElement?.tagName") == "INPUT":
        return True
    browser.find_element(By.CSS_SELECTOR, ".md-search button").click()
    return False


def test_site_is_read_and_searched_from_the_disk(site: Path, browser: Browser) -> None:
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get((site / "index.html").as_uri())
    wait = WebDriverWait(browser, 40)
    wait.until(search_is_open)
    ActionChains(browser).send_keys("max_swap_distance").perform()
    links = f"return [...{SEARCH}.querySelectorAll('a')].map(link => link.href)"
    hit = "/configuration.html?h=#pipelinemax_swap_distance"
    wait.until(lambda driver: any(link.endswith(hit) for link in driver.execute_script(links)))
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    loaded = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert [url for url in loaded if not url.startswith(("file:", "data:", "chrome:"))] == []
