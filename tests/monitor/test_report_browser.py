"""The page in a real browser: everything is drawn, nothing goes wrong, nothing is loaded from anywhere."""

import time
from pathlib import Path

import pytest
from browsing import PLOTS, Browser, open_page
from crowding import at_most_s
from random_plans import random_plan
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from small_runs import write_run

from skippipe.monitor.report import write_comparison_report, write_plan_report, write_run_report
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.simulate import simulate


def headings(browser: Browser) -> list[str]:
    return [heading.text for heading in browser.find_elements(By.TAG_NAME, "h2")]


def bars(browser: Browser) -> list[int]:
    """Return the number of bars in each picture that has any."""
    counted = f"return {PLOTS}.map(plot => plot.querySelectorAll('.bars .point').length)"
    return [number for number in browser.execute_script(counted) if number]


def test_plan_page(browser: Browser, plan: Plan, full_plan: Plan, tmp_path: Path) -> None:
    write_plan_report(tmp_path / "plan.html", plan, {"full pipeline": full_plan})
    open_page(browser, tmp_path / "plan.html")
    assert headings(browser) == [
        "Predicted times",
        "One iteration",
        "What the iteration waits for",
        "Load and memory over time",
        "Regions",
        "Routes",
        "Nodes",
    ]
    reductions = 4
    assert bars(browser) == [len(simulate(drawn).tasks) + reductions for drawn in (plan, full_plan)]
    assert len(browser.find_elements(By.CSS_SELECTOR, "table")) == 5
    kinds = f"return {PLOTS}.map(plot => plot.data.filter(trace => trace.type === 'heatmap').length)"
    assert browser.execute_script(kinds) == [0, 0, 1, 1, 0, 0]
    line = f"return {PLOTS}[0].data.filter(trace => trace.name === 'Critical path')[0].x.slice(-1)[0]"
    assert browser.execute_script(line) == pytest.approx(plan.predicted.iteration_s)
    facts = {
        fact.text.split("\n")[0]: fact.text.split("\n")[1]
        for fact in browser.find_elements(By.CSS_SELECTOR, ".facts div")
    }
    assert facts["Predicted iteration"] == f"{plan.predicted.iteration_s:.2f} s"


def test_a_page_of_twenty_nodes_is_drawn_quickly(browser: Browser, tmp_path: Path) -> None:
    plan = random_plan(0, num_nodes=20, num_stages=6, route_length=5, num_microbatches=30)
    write_plan_report(tmp_path / "plan.html", plan, {"another": plan, "a third": plan})
    started_s = time.monotonic()
    open_page(browser, tmp_path / "plan.html")
    assert time.monotonic() - started_s < at_most_s(15)
    assert bars(browser)[0] > 30 * 11


def test_run_page(browser: Browser, run_dir: Path, plan: Plan) -> None:
    open_page(browser, write_run_report(run_dir))
    assert headings(browser) == [
        "Predicted and measured time",
        "One iteration",
        "Loss",
        "Perplexity with part of the depth",
        "Regions",
        "Routes",
        "Nodes",
        "Settings",
    ]
    tasks = len(simulate(plan).tasks)
    assert bars(browser) == [2, tasks + 4, tasks]
    labels = browser.execute_script("return [...document.querySelectorAll('.ytick text')].map(e => e.textContent)")
    assert [f"{node} · stage {plan.stage_of[node]}" for node in plan.nodes] == labels[1:7]


def test_comparison_page(browser: Browser, plan: Plan, full_plan: Plan, tmp_path: Path) -> None:
    runs = {
        "full pipeline": write_run(tmp_path / "full", full_plan, "full"),
        "SkipPipe": write_run(tmp_path / "skip", plan, "skip"),
    }
    page = tmp_path / "report.html"
    write_comparison_report(page, runs, title="Two runs", facts={"Iteration time": "0.62 of the other"})
    open_page(browser, page)
    assert browser.title == "Two runs"
    assert "0.62 of the other" in browser.find_element(By.CSS_SELECTOR, ".facts").text
    full, skip = (len(simulate(drawn).tasks) for drawn in (full_plan, plan))
    assert bars(browser) == [4, full + 4, full, skip + 4, skip]
    ranges = browser.execute_script(f"return {PLOTS}.slice(1, 5).map(plot => plot._fullLayout.xaxis.range)")
    assert all(axis == ranges[0] for axis in ranges), "the Gantt charts share one time axis"
    rows = [row.text for row in browser.find_elements(By.CSS_SELECTOR, "tbody tr")]
    assert any(row.startswith("SkipPipe 24 ") and "1.02" in row for row in rows), rows


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_is_readable_in_light_and_dark(browser: Browser, plan: Plan, tmp_path: Path, scheme: str) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    write_plan_report(tmp_path / "plan.html", plan, {})
    open_page(browser, tmp_path / "plan.html")
    colours = "return [getComputedStyle(document.querySelector('section')).backgroundColor,"
    colours += "getComputedStyle(document.querySelector('.xtick text')).fill]"
    ground, ink = browser.execute_script(colours)
    assert contrast(ground, ink) > 7


def test_pictures_keep_their_height_when_the_window_changes(browser: Browser, plan: Plan, tmp_path: Path) -> None:
    write_plan_report(tmp_path / "plan.html", plan, {})
    open_page(browser, tmp_path / "plan.html")
    sizes = f"return {PLOTS}.map(plot => [plot.clientWidth, plot.clientHeight, plot._fullLayout.height])"
    before = browser.execute_script(sizes)
    browser.set_window_size(900, 700)
    try:
        drawn = f"return {PLOTS}.every(plot => plot._fullLayout.width === plot.clientWidth)"
        WebDriverWait(browser, 10).until(lambda driver: driver.execute_script(drawn))
        after = browser.execute_script(sizes)
    finally:
        browser.set_window_size(1280, 900)
    assert all(new[0] < old[0] for new, old in zip(after, before, strict=True))
    assert [new[1:] for new in after] == [old[1:] for old in before]


def contrast(first: str, second: str) -> float:
    """Return the contrast ratio of two CSS colours, 1 to 21 (WCAG 2)."""
    luminances = []
    for text in (first, second):
        parts = [int(part) / 255 for part in text[text.index("(") + 1 : -1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        luminances.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
    return max(luminances) / min(luminances)


def test_relays_are_drawn_as_triangles(browser: Browser, relaying_plan: Plan, tmp_path: Path) -> None:
    write_plan_report(tmp_path / "plan.html", relaying_plan, {})
    open_page(browser, tmp_path / "plan.html")
    points = f"return {PLOTS}.map(plot => plot.querySelectorAll('.scatterlayer .point').length)"
    assert browser.execute_script(points)[0] == 2 * len(relaying_plan.microbatches)
    legend = f"return [...{PLOTS}[0].querySelectorAll('.legendtext')].map(text => text.textContent)"
    assert {"Forward relay", "Backward relay"} <= set(browser.execute_script(legend))
