"""The table of metrics: what is written has its keys, files of before are read, and no other file spells a key."""

import ast
import importlib
import inspect
import json
from pathlib import Path

import pytest
from full_disk import largest_file
from small_runs import write_run

from skippipe.errors import InputError
from skippipe.monitor.metrics import FORMER_KEYS, Metric
from skippipe.monitor.metrics_file import MetricsWriter, read_metrics
from skippipe.monitor.report.run_record import read_run_record
from skippipe.monitor.sinks import Reporter
from skippipe_scheduler.plan.plan import Plan

ROOT = Path(__file__).parents[2]
OF_BEFORE = '{"step": 3, "train/loss": 2.5, "checkpoint/stopped_s": 0.25, "own/key": 1}\n'
"""A line of a version that called the time a save blocks training by another name; and a key of somebody else."""


def test_the_documentation_has_the_table() -> None:
    rows = [f"| `{metric}` | {metric.unit} | {metric.meaning} |" for metric in Metric]
    table = "\n".join(["| key | unit | meaning |", "|---|---|---|", *rows])
    assert table in (ROOT / "docs" / "monitoring.md").read_text(), f"docs/monitoring.md has to have:\n{table}"


@pytest.mark.parametrize("metric", list(Metric))
def test_a_metric_is_measured_where_the_table_says(metric: Metric) -> None:
    assert f"Metric.{metric.name}" in inspect.getsource(importlib.import_module(metric.measured_in))


def test_nobody_spells_a_key_himself() -> None:
    keys = {str(metric) for metric in Metric if "/" in metric} | FORMER_KEYS.keys()
    spelled = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.value}"
        for folder in ("skippipe", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if path != ROOT / "skippipe" / "monitor" / "metrics.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in keys
    ]
    assert spelled == []


def test_steps_are_lines_under_their_keys(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write({Metric.STEP: 1, Metric.TRAIN_LOSS: 2.5, Metric.PLAN: "main"})
    writer.close()
    assert path.read_text() == '{"step": 1, "train/loss": 2.5, "pipeline/plan": "main"}\n'
    assert read_metrics(path) == [{"step": 1, "train/loss": 2.5, "pipeline/plan": "main"}]


def test_lines_of_before_are_read_and_continued(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(OF_BEFORE + '{"step": 4, "train/lo')
    expected = {"step": 3, "train/loss": 2.5, "checkpoint/blocked_s": 0.25, "own/key": 1}
    assert read_metrics(path) == [expected]
    writer = MetricsWriter(path, first_step=3)
    writer.write({Metric.STEP: 4})
    writer.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [expected, {"step": 4}]


def test_a_report_shows_a_run_of_before(plan: Plan, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", plan, "old")
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write("\n" + OF_BEFORE)
    run = read_run_record(folder)
    assert run.last(Metric.BLOCKED_S) == 0.25
    assert run.steps[2] == {"step": 3.0, "train/loss": 2.5, "checkpoint/blocked_s": 0.25, "own/key": 1.0}
    assert run.damaged_lines == 1


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"metrics\.jsonl: cannot be read .*give a run that has been trained"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_disk_that_was_full_for_a_while_costs_no_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    path = tmp_path / "metrics.jsonl"
    reporter = Reporter([MetricsWriter(path)])
    reporter.write({Metric.STEP: 1})
    with largest_file(path.stat().st_size + 5):  # a part of the next line fits
        for step in (2, 3):
            reporter.write({Metric.STEP: step})
        assert read_metrics(path) == [{"step": 1}]
    reporter.write({Metric.STEP: 4})
    reporter.close()
    assert path.read_text() == "".join(f'{{"step": {step}}}\n' for step in (1, 2, 3, 4))
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["step 2", "step 4"]
    assert "cannot be written (File too large); it is tried again at every step" in caplog.text


def test_what_waits_at_the_end_is_written_then(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reporter = Reporter([MetricsWriter(path)])
    path.unlink()
    path.mkdir()
    reporter.write({Metric.STEP: 1})
    path.rmdir()
    reporter.close()
    assert read_metrics(path) == [{"step": 1}]


def test_steps_that_are_missing_before_a_resume_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "tra\n{"step": true}\n[3]\n{"step": 4}\n{"step": 5}\n')
    MetricsWriter(path, first_step=4, continued=True)
    assert "2 of the 4 steps before are missing or damaged" in caplog.text
    assert read_metrics(path) == [{"step": 1}, {"step": 4}]
    caplog.clear()
    MetricsWriter(tmp_path / "of-another-run.jsonl", first_step=4)
    assert caplog.text == ""
