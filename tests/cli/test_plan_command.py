"""`skippipe plan` with what it can be asked for beyond the defaults."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from random_plans import random_plan, with_relays

from skippipe.cli.commands.plan_command import plan_table, search_limit_s
from skippipe.cli.main import main
from skippipe_scheduler.plan.plan import parse_plan
from skippipe_scheduler.solver.other_routes import other_routes_problem
from skippipe_scheduler.solver.planner import PlanWithBaselines

TINY = Path(__file__).parents[2] / "configs" / "experiments" / "tiny.yaml"
SHORT = ("pipeline.planner.max_evaluations=2000",)


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--config", str(TINY), *arguments, *SHORT])
    captured = capsys.readouterr()
    assert not stop.value.code, captured.err
    return captured.out


def test_explanation_names_the_critical_path_and_the_busiest_node(capsys: pytest.CaptureFixture[str]) -> None:
    printed = json.loads(plan(capsys, "--explain", "--json"))["explanation"]
    assert "Critical path: " in printed
    assert "Busiest node: worker-" in printed
    assert "Stage 1 is bound by the work of its 1 replica" in printed


@pytest.mark.parametrize(
    ("limit_s", "begun_s", "writes_report", "left_s"),
    [(30, 0.5, False, 30), (30, 5, False, 26), (30, 5, True, 24), (2, 9, True, 1)],
)
def test_the_limit_is_that_of_the_command(limit_s: float, begun_s: float, writes_report: bool, left_s: float) -> None:
    assert search_limit_s(limit_s, begun_s, writes_report) == left_s


def test_mix_of_route_lengths(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    printed = plan(capsys, "--out", str(tmp_path / "plan.json"), "pipeline.route_lengths={3: 1, 2: 3}")
    assert "4 microbatches over 3 or 2 stages each" in printed
    found = parse_plan(tmp_path / "plan.json")
    assert Counter(len(microbatch.route) for microbatch in found.microbatches) == {3: 1, 2: 3}


def test_routes_are_in_order_unless_swaps_are_asked_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for asked, max_swaps in ((), 0), (("pipeline.max_swaps=1",), 1):
        plan(capsys, "--out", str(tmp_path / "plan.json"), *asked)
        assert parse_plan(tmp_path / "plan.json").rules.max_swaps == max_swaps


def test_origins_may_start_different_numbers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plan(capsys, "--out", str(tmp_path / "plan.json"), "pipeline.microbatches_per_origin=auto")
    assert len(parse_plan(tmp_path / "plan.json").microbatches) == 4


def test_warm_start_is_never_worse(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first, second, page = tmp_path / "first.json", tmp_path / "second.json", tmp_path / "plan.html"
    plan(capsys, "--out", str(first))
    plan(capsys, "--warm", str(first), "--out", str(second), "--report", str(page))
    assert parse_plan(second).predicted.iteration_s <= parse_plan(first).predicted.iteration_s
    assert "Stage 1 is bound by the work of its 1 replica" in page.read_text()


def test_warm_start_from_what_is_no_plan(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--config", str(TINY), "--warm", str(TINY)])
    assert stop.value.code == 2
    assert "tiny.yaml" in capsys.readouterr().err


def test_the_table_says_how_many_microbatches_are_relayed() -> None:
    full = random_plan(1, route_length=4, swaps=0, num_microbatches=4)
    rules = full.rules.model_copy(update={"route_length": 3, "uniform_coverage": False, "route_lengths": {4: 1, 3: 1}})
    relayed = with_relays(full, [(0, 1, 2), (0, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3)], rules)
    problem = other_routes_problem(full, full.rules)
    words = "of 2 microbatches, nodes of stages that they leave out relay the messages and compute nothing"
    assert words in plan_table(PlanWithBaselines(problem, relayed, full, full)).splitlines()
    assert "relay" not in plan_table(PlanWithBaselines(problem, full, full, full))


def test_pinned_nodes_stay(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for stage in (0, 2):
        plan(capsys, "--out", str(tmp_path / "plan.json"), f"pipeline.pinned={{worker-2: {stage}}}")
        assert parse_plan(tmp_path / "plan.json").stage_of["worker-2"] == stage


def test_layers_are_chosen_for_a_slow_stage(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cluster, out = tmp_path / "cluster.yaml", tmp_path / "plan.json"
    speeds = [0.004, 0.004, 0.001]
    nodes = [
        {"name": f"n{rank}", "region": "r", "compute_tflop_per_s": speed, "max_in_flight": 4}
        for rank, speed in enumerate(speeds)
    ]
    links = {"contention": "link", "within_region": {"latency_ms": 0.01, "gbit_per_s": 100}}
    cluster.write_text(json.dumps({"name": "uneven", "nodes": nodes, "links": links}))
    stages = [f"cluster={cluster}", "pipeline.placement=[[n0],[n1],[n2]]", "pipeline.skip_ratio=0.0"]
    printed = plan(capsys, "--out", str(out), "pipeline.layers_per_stage=auto", *stages)
    chosen = parse_plan(out)
    assert chosen.layers_per_stage[2] < 2
    assert sum(chosen.layers_per_stage) == 6
    assert f"1/1/1 replicas and {'/'.join(map(str, chosen.layers_per_stage))} layers" in printed
    plan(capsys, "--out", str(out), *stages)
    even = parse_plan(out)
    assert even.layers_per_stage == (2, 2, 2)
    assert chosen.predicted.iteration_s < 0.9 * even.predicted.iteration_s
    plan(capsys, "--warm", str(out), "--out", str(out), "pipeline.layers_per_stage=auto", *stages)
    assert parse_plan(out).layers_per_stage == (2, 2, 2)


def test_reduction_is_timed_as_asked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    times_s = {}
    for reduction in ("ring", "tree", "direct"):
        sizes = "pipeline.stage_sizes=[2,1,1]"
        plan(capsys, "--out", str(tmp_path / "plan.json"), sizes, f"pipeline.reduction={reduction}")
        times_s[reduction] = parse_plan(tmp_path / "plan.json").costs.reduce_s
    ring_s, tree_s = times_s["ring"], times_s["tree"]
    assert ring_s
    assert tree_s
    # Two replicas exchange halves in a ring, the whole in a tree, over links of 0.05 ms.
    assert tree_s[0] - 1e-4 == pytest.approx(2 * (ring_s[0] - 1e-4))
    assert tree_s[1:] == ring_s[1:] == (0, 0)
    assert times_s["direct"] == pytest.approx(ring_s)


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    printed = json.loads(plan(capsys, "--json", "pipeline.planner.jitter_sigma=0.3"))
    assert set(printed["predicted"]) == {"plan", "full_pipeline", "network-blind_skipping"}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("pipeline.route_lengths={4: 1}", "more than the 3 stages"),
        ("pipeline.route_lengths={1: 1}", "route_lengths"),
        ("pipeline.microbatches_per_origin=some", "microbatches_per_origin"),
        ("pipeline.pinned={worker-9: 0}", "unknown node 'worker-9'; did you mean 'worker-"),
        ("pipeline.pinned={worker-0: 3}", "stages are 0 to 2"),
        ("pipeline.reduction=star", "reduction"),
        ("pipeline.planner.jitter_sigma=-1", "jitter_sigma"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], override: str, expected: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--config", str(TINY), override])
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert expected in message
    assert "Traceback" not in message


def test_interrupt_writes_the_best_so_far(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    command = [
        sys.executable,
        "-m",
        "skippipe",
        "plan",
        "--config",
        str(TINY),
        "--time-limit",
        "300",
        "--out",
        str(out),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    assert process.stderr is not None
    assert "solving: this plan" in process.stderr.readline()
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    assert "this plan" in printed
    assert "the full pipeline was searched for 0." in printed
    assert parse_plan(out).predicted.iteration_s > 0


def test_rules_that_conflict(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--config", str(TINY), "--out", str(out), "pipeline.max_forward_jump=1", *SHORT])
    captured = capsys.readouterr()
    assert stop.value.code == 3
    assert "route_length 2 of 3 stages and max_forward_jump 1 for 4 microbatches" in captured.err
    assert "raise max_forward_jump to 2" in captured.err
    assert captured.err.count("cannot be met together") == 1
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert not out.exists()
