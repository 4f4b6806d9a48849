"""Reading run directories, whole and damaged, and the command that writes the page."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from small_runs import write_run

from skippipe.cli.commands.report_command import command
from skippipe.cli.main import main
from skippipe.errors import InputError
from skippipe.monitor.metrics import Metric
from skippipe.monitor.report.reports import write_comparison_report, write_plan_report, write_run_report
from skippipe.monitor.report.run_record import read_run_record
from skippipe.monitor.report.summary import nodes_table, plans_table, runs_table
from skippipe.monitor.run_events import MembershipChange
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.simulate import simulate


def test_run_is_read_up_to_the_line_that_a_crash_cut(run_dir: Path, plan: Plan) -> None:
    run = read_run_record(run_dir)
    assert [step["step"] for step in run.steps] == list(range(1, 25))
    assert run.damaged_lines == 1
    assert run.measured_s == pytest.approx(1.02 * plan.predicted.iteration_s, rel=0.01)
    assert run.ratio == pytest.approx(1.02, rel=0.01)
    assert run.evaluation is not None
    assert [result.kept_stages for result in run.evaluation.results] == [4, 3, 2]


def test_steps_that_a_resumed_run_did_again_count_once(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as stream:
        stream.write('\n{"step": 24, "train/loss": 9.0}\n{"step": 25, "train/loss": NaN, "tokens": 7}\n')
    run = read_run_record(run_dir)
    assert len(run.steps) == 25
    assert run.last(Metric.TRAIN_LOSS) == 9.0
    assert run.last(Metric.TOKENS) == 7


def test_trace_shows_the_recorded_step_nearest_the_median(run_dir: Path, plan: Plan) -> None:
    measured = read_run_record(run_dir).measured
    assert measured is not None
    assert measured.step == 10
    assert len(measured.spans) == len(simulate(plan).tasks)


@pytest.mark.parametrize("num_lost", [1, 5])
def test_trace_shows_a_step_of_all_present_nodes_after_a_loss(run_dir: Path, plan: Plan, num_lost: int) -> None:
    lost, present = plan.nodes[:num_lost], plan.nodes[num_lost:]
    for node in lost:
        path = run_dir / "trace" / f"{node}.jsonl"
        path.write_text(path.read_text().replace('"step": 10,', '"step": 4,').replace('"step": 20,', '"step": 5,'))
    MembershipChange(
        epoch=1,
        lost=dict.fromkeys(lost, "connection closed"),
        joined=(),
        members=present,
        absent_stages=(),
        restored=(),
        reason="lost",
        step=6,
        interrupted=True,
        durations_s={},
        total_s=1.5,
    ).append_to(run_dir)
    measured = read_run_record(run_dir).measured
    assert measured is not None
    assert (measured.step, {span.node for span in measured.spans}) == (10, {*present})


def test_damaged_trace_lines_are_left_out(run_dir: Path) -> None:
    for path in (run_dir / "trace").iterdir():
        path.write_text('{"node": "ams-0"}\n[1]\n{"no')
    assert read_run_record(run_dir).measured is None


@pytest.mark.parametrize("name", ["config.yaml", "plan.json"])
def test_missing_file_is_named_with_the_remedy(run_dir: Path, name: str) -> None:
    (run_dir / name).unlink()
    with pytest.raises(InputError, match=rf"{name}: no such file; give the run directory"):
        read_run_record(run_dir)


def test_wrong_evaluation_is_named(run_dir: Path) -> None:
    (run_dir / "evaluation.json").write_text(
        '{"model": "tiny", "checkpoint": "step-00000001", "tokens": 1, "policies": ["random"], '
        '"results": [{"policy": "random", "keep": 1.0, "kept_stages": 4, "kept_layers": 4.0}]}'
    )
    with pytest.raises(InputError, match=r"evaluation\.json: results\.0\.share_computed"):
        read_run_record(run_dir)


def test_run_before_its_first_step_still_has_a_page(run_dir: Path) -> None:
    for name in ("metrics.jsonl", "evaluation.json"):
        (run_dir / name).unlink()
    text = write_run_report(run_dir).read_text()
    assert "No step has been finished yet" in text
    assert "skippipe evaluate RUN" in text


def test_command_writes_the_page_and_prints_its_path(run_dir: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(command, [str(run_dir)])
    assert result.exit_code == 0
    assert result.output == f"{run_dir / 'report.html'}\n"
    assert (run_dir / "report.html").stat().st_size > 1_000_000
    out = tmp_path / "pages" / "other.html"
    assert CliRunner().invoke(command, [str(run_dir), "--out", str(out)]).output == f"{out}\n"
    assert out.exists()


def test_command_without_a_run_ends_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path / "nothing")])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "no such directory; give the run directory" in lines[0]


def test_perplexity_stands_with_its_checkpoint(run_dir: Path, full_plan: Plan, tmp_path: Path) -> None:
    newest, old = "Measured: step-00000024 of skip.", "Measured: step-00000006 of skip."
    remark = "Skip is at step 24, so these are not its newest weights"
    page = write_run_report(run_dir).read_text()
    assert (newest in page, remark in page) == (True, False)
    file = run_dir / "evaluation.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"checkpoint": "step-00000006"}))
    page = write_run_report(run_dir).read_text()
    assert (old in page, remark in page) == (True, True)
    out, other = tmp_path / "page.html", write_run(tmp_path / "other", full_plan, "full depth")
    write_comparison_report(out, {"skip": run_dir, "full depth": other}, "Both", {})
    page = out.read_text()
    assert all(text in page for text in ("step-00000006 of skip; step-00000024 of full depth.", remark))
    assert "Full depth is at step" not in page
    (run_dir / "metrics.jsonl").unlink()
    page = write_run_report(run_dir).read_text()
    assert (old in page, "is at step" in page) == (True, False)


def test_command_shows_several_runs_or_evaluations_in_one_page(run_dir: Path, full_plan: Plan, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", full_plan, "full depth")
    files = [run_dir / "evaluation.json", other / "evaluation.json", tmp_path / "copy.json"]
    task = {"task": "riddles", "policy": "random", "keep": 0.5, "share_computed": 0.5, "metric": "acc", "value": 0.25}
    content = json.loads(files[0].read_text()) | {"tasks": [task | {"standard_error": None, "documents": 4}]}
    files[2].write_text(json.dumps(content))
    out = tmp_path / "page.html"
    result = CliRunner().invoke(command, [str(run_dir), str(other), "--out", str(out)])
    assert result.output == f"{out}\n"
    assert all(text in out.read_text() for text in ("2 runs", "full depth", "One iteration", "Perplexity with part"))
    result = CliRunner().invoke(command, [*map(str, files), "--out", str(out)])
    assert result.output == f"{out}\n"
    page = out.read_text()
    assert "One iteration" not in page
    assert all(text in page for text in (f"skip ({run_dir})", f"skip ({files[2]})", "full depth", "riddles"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{run}", "{run}/evaluation.json", "--out", "page.html"], "give run directories, or files"),
        (["{run}", "{run}"], "--out PAGE.html"),
        (["{run}/evaluation.json"], "--out PAGE.html"),
        (["{run}/nothing.json", "--out", "page.html"], "nothing.json: no such file"),
        ([], "Missing argument"),
    ],
)
def test_command_says_what_is_wrong(
    run_dir: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["report", *(argument.format(run=run_dir) for argument in arguments)])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert expected in message
    assert "Traceback" not in message


def test_names_are_escaped_and_figures_cannot_end_their_script(plan: Plan, tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    write_plan_report(tmp_path / "plan.html", plan, {evil: plan})
    text = (tmp_path / "plan.html").read_text()
    assert "<script>alert(1)" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_plan_tables_show_times_gap_and_load(plan: Plan, full_plan: Plan) -> None:
    rows = plans_table({"this plan": plan, "full pipeline": full_plan}, "full pipeline").rows
    ratio = plan.predicted.iteration_s / full_plan.predicted.iteration_s
    assert rows[1][-1] == "1.00"
    assert str(rows[0][-1]) == f"{ratio:.2f}"
    gap = 1 - plan.predicted.lower_bound_s / plan.predicted.iteration_s
    assert rows[0][5] == f"{gap * 100:.1f} %"
    loads = {row[0]: row for row in nodes_table(plan, simulate(plan)).rows}
    assert list(loads) == ["ams-0", "nyc-0", "nyc-1", "ams-1", "ams-2", "nyc-2"]
    assert loads["nyc-1"][3] == "3"


def test_pages_of_a_plan_that_relays_say_so(relaying_plan: Plan, full_plan: Plan, tmp_path: Path) -> None:
    write_plan_report(tmp_path / "plan.html", relaying_plan, {"full pipeline": full_plan})
    write_run_report(write_run(tmp_path / "run", relaying_plan, "relays"), tmp_path / "run.html")
    for page in ("plan.html", "run.html"):
        text = (tmp_path / page).read_text()
        for words in ("A triangle is a relay", "A triangle on a line is a relay", "Backward relay", "3 + 1 relayed"):
            assert words in text
    write_plan_report(tmp_path / "full.html", full_plan, {})
    assert "relay" not in (tmp_path / "full.html").read_text().lower().replace("relayout", "")


def test_runs_table_has_measured_beside_predicted(run_dir: Path) -> None:
    row = runs_table({"SkipPipe": read_run_record(run_dir)}).rows[0]
    assert row[:2] == ("SkipPipe", "24")
    assert str(row[4]).startswith("1.02")


def test_comparison_names_the_run_that_is_wrong(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gone: no such directory"):
        write_comparison_report(tmp_path / "both.html", {"a": run_dir, "b": tmp_path / "gone"}, "Both", {})
    assert not (tmp_path / "both.html").exists()


def test_metrics_with_other_types_are_ignored(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text(json.dumps({"step": 1, "note": "text", "flag": True, "train/loss": 1}))
    assert read_run_record(run_dir).steps == [{"step": 1.0, "train/loss": 1.0}]
