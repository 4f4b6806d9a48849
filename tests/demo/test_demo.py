"""`skippipe demo` as a user runs it, with fewer steps: ranks, links, evaluation, and its page in a browser."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from browsing import Browser, open_page
from selenium.webdriver.common.by import By

from skippipe.monitor.metrics_file import read_metrics
from skippipe_scheduler.plan.plan import Plan, parse_plan

STEPS = 6
FEWER = (
    f"training.max_steps={STEPS}",
    "lr_scheduler.warmup_steps=2",
    "data.max_bytes=1000000",
    f"evaluation.interval={STEPS // 2}",
    "evaluation.batches=1",
    "pipeline.planner.time_limit_s=2",
)
RUNS = ("full-pipeline", "skippipe")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run the demo; return its folder and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    finished = subprocess.run(
        [sys.executable, "-m", "skippipe", "demo", "--out", str(folder / "demo"), *FEWER],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return folder / "demo", finished.stdout


def plans(folder: Path) -> list[Plan]:
    return [parse_plan(folder / run / "plan.json") for run in RUNS]


def test_table_says_what_the_files_say(demo: tuple[Path, str]) -> None:
    folder, printed = demo
    rows = {line[:16].strip(): line[16:].split() for line in printed.splitlines()}
    for name, run, plan in zip(("full pipeline", "SkipPipe"), RUNS, plans(folder), strict=True):
        evaluated = json.loads((folder / run / "evaluation.json").read_text())
        perplexities = [f"{depth['perplexity']:.3f}" for depth in evaluated["results"]]
        assert [depth["keep"] for depth in evaluated["results"]] == [1.0, 0.67, 0.5]
        assert rows[name][0] == f"{plan.predicted.iteration_s:.3f}"
        assert rows[name][4:] == perplexities


def test_both_runs_see_the_same_tokens_and_lose_less_with_time(demo: tuple[Path, str]) -> None:
    folder, _ = demo
    full, skip = plans(folder)
    assert full.nodes == skip.nodes
    assert {len(route.route) for route in full.microbatches} == {6}
    assert {len(route.route) for route in skip.microbatches} == {4}
    series = [read_metrics(folder / run / "metrics.jsonl") for run in RUNS]
    assert [entry["tokens"] for entry in series[0]] == [entry["tokens"] for entry in series[1]]
    for entries in series:
        assert len(entries) == STEPS
        assert entries[-1]["train/loss"] < entries[0]["train/loss"]
        assert [entry["step"] for entry in entries if "val/loss" in entry] == [STEPS // 2, STEPS]


def test_skipping_is_faster_on_the_emulated_links(demo: tuple[Path, str]) -> None:
    folder, _ = demo
    full, skip = plans(folder)
    assert skip.predicted.iteration_s < 0.6 * full.predicted.iteration_s
    measured = []
    for run, plan in zip(RUNS, (full, skip), strict=True):
        durations = [entry["perf/iteration_s"] for entry in read_metrics(folder / run / "metrics.jsonl")]
        measured.append(min(durations))
        assert min(durations) > 0.97 * plan.predicted.iteration_s, "emulated links are not faster than planned"
    assert measured[1] < 0.8 * measured[0]


def test_wandb_ran_offline(demo: tuple[Path, str]) -> None:
    folder, _ = demo
    for run in RUNS:
        assert list((folder / run / "wandb").glob("offline-run-*/*.wandb"))


def test_page_shows_both_runs(demo: tuple[Path, str], browser: Browser) -> None:
    folder, _ = demo
    open_page(browser, folder / "report.html")
    text = browser.find_element(By.TAG_NAME, "body").text
    for expected in ("full pipeline", "SkipPipe", "Half the depth costs", "Predicted and measured time", "Routes"):
        assert expected in text
    assert len(browser.find_elements(By.CSS_SELECTOR, ".plotly-graph-div")) >= 7
