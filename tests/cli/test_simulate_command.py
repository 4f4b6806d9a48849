"""`skippipe simulate`: what it prints, for people and for programs, and what it says about mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from random_plans import random_plan

from skippipe.cli.commands.simulate_command import command
from skippipe.cli.main import main
from skippipe_scheduler.analysis.node_loss import simulate_loss
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.recost import recost
from skippipe_scheduler.plan.simulate import simulate
from skippipe_scheduler.problem.cluster import load_cluster


@pytest.fixture(scope="module")
def plan() -> Plan:
    return random_plan(5, num_microbatches=8, contention="node")


@pytest.fixture
def path(plan: Plan, tmp_path: Path) -> str:
    plan.save(tmp_path / "plan.json")
    return str(tmp_path / "plan.json")


def output(*arguments: str) -> str:
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def printed_object(*arguments: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(output(*arguments, "--json"))
    return content


def test_text_has_a_row_a_node_and_the_critical_path(plan: Plan, path: str) -> None:
    text = output(path)
    assert f"iteration {plan.predicted.iteration_s:.4f} s" in text
    peak = simulate(plan).peak_memory
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.split()[0] in plan.nodes}
    assert {node: row[-1] for node, row in rows.items()} == {
        node: f"{peak[node]}/{plan.costs.memory[node]}" for node in plan.nodes
    }
    assert f"Critical path: {plan.predicted.iteration_s:.4f} s" in text
    assert "by kind     backward" in text


def test_a_plan_that_relays_is_replayed(tmp_path: Path) -> None:
    plan = random_plan(5, num_microbatches=8, contention="node", relays=0.5)
    plan.save(tmp_path / "plan.json")
    content = printed_object(str(tmp_path / "plan.json"), "--trace", str(tmp_path / "trace.json"))
    assert content["iteration_s"] == plan.predicted.iteration_s
    names = [event["name"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
    relays = sum(len(microbatch.relays) for microbatch in plan.microbatches)
    assert sum(name.startswith("forward relay ") for name in names) == relays > 0
    assert sum(name.startswith("backward relay ") for name in names) == relays


def test_json_is_one_object_that_adds_up(plan: Plan, path: str) -> None:
    content = printed_object(path)
    assert content["iteration_s"] == plan.predicted.iteration_s
    assert list(content["nodes"]) == list(plan.nodes)
    segments = content["critical_path"]["segments"]
    assert sum(part["end_s"] - part["start_s"] for part in segments) == pytest.approx(plan.predicted.iteration_s)
    assert sum(link["num_transfers"] for link in content["links"]) == len(simulate(plan).transfers)
    assert "samples" not in content


def test_samples_are_summarised(plan: Plan, path: str) -> None:
    arguments = (path, "--jitter", "0.4", "--samples", "8", "--seed", "3")
    iterations_s = [simulate(plan, jitter_sigma=0.4, seed=seed).iteration_s for seed in range(3, 11)]
    samples = printed_object(*arguments)["samples"]
    assert samples["mean_s"] == pytest.approx(sum(iterations_s) / 8)
    assert samples["max_s"] == max(iterations_s)
    assert f"8 samples: mean {samples['mean_s']:.4f} s" in output(*arguments)


def test_a_loss_is_accounted_for(plan: Plan, path: str, tmp_path: Path) -> None:
    second = plan.predicted.iteration_s * 0.6
    loss = simulate_loss(plan, {"node-2": second})
    content = printed_object(path, "--lose", f"node-2={second!r}", "--trace", str(tmp_path / "trace.json"))["loss"]
    assert content["unfinished"] == list(loss.unfinished)
    assert content["lost_work_s"] == loss.lost_work_s
    assert "node-2" not in content["nodes"]
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    text = output(path, "--lose", f"node-2={second!r}")
    assert f"{len(loss.unfinished)} of 8 microbatches cannot finish: {loss.unfinished[0]}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slow", "nobody=2"], "the plan has no node 'nobody'"),
        (["--slow", "rack=3=2"], "the plan has no node 'rack=3'"),
        (["--slow", "node-0"], "--slow node-0: expected NODE=FACTOR"),
        (["--slow", "node-0=2", "--slow", "node-0=3"], "--slow node-0=3: node-0 has 2 already; give one of them"),
        (["--slow", "node-0=0"], "expected NODE=FACTOR with a positive number and at most 1e+09"),
        (["--slow", "node-0=1e300"], "at most 1e+09"),
        (["--lose", "node-0"], "expected NODE=SECONDS with a number of at least 0"),
        (["--lose", "node-0=nan"], "expected NODE=SECONDS"),
        (["--lose", "node-0=-1"], "expected NODE=SECONDS"),
        (["--samples", "5"], "add --jitter SIGMA"),
        (["--samples", "5", "--jitter", "0.1", "--lose", "node-0=1"], "give one of the two"),
        (["--samples", "0", "--jitter", "0.1"], "--samples"),
        (["--jitter", "nan"], "from 0 to 5"),
        (["--jitter", "1000"], "--jitter"),
    ],
)
def test_mistakes_are_named(path: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["simulate", path, *arguments])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_times_of_another_cluster(plan: Plan, path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    node = "{name: %s, region: r, forward_s: 0.2, backward_s: 0.3, loss_s: 0.1, max_in_flight: 9}"
    links = "links: {contention: link, default: {latency_ms: 5, gbit_per_s: 1}}\n"
    nodes = "".join(f"  - {node % name}\n" for name in plan.nodes)
    (tmp_path / "cluster.yaml").write_text(f"name: other\nnodes:\n{nodes}{links}")
    cluster = load_cluster(tmp_path / "cluster.yaml")
    expected_s = simulate(recost(plan, cluster)).iteration_s
    assert expected_s != pytest.approx(plan.predicted.iteration_s)
    assert printed_object(path, "--cluster", str(tmp_path / "cluster.yaml"))["iteration_s"] == expected_s
    (tmp_path / "cluster.yaml").write_text(f"name: other\nnodes:\n{nodes.replace(plan.nodes[0], 'x')}{links}")
    with pytest.raises(SystemExit) as stop:
        main(["simulate", path, "--cluster", str(tmp_path / "cluster.yaml")])
    assert stop.value.code == 2
    assert "is not in both the cluster and the plan" in capsys.readouterr().err


def test_a_trace_is_replayed_by_all_methods(path: str, plan: Plan, tmp_path: Path) -> None:
    trace, page = tmp_path / "trace.csv", tmp_path / "churn.html"
    iteration_s = plan.predicted.iteration_s
    trace.write_text(f"time_s,node,event\n{iteration_s * 1.5},node-1,lost\n{iteration_s * 3},,end\n")
    options = (path, "--churn", str(trace), "--evaluations", "0", "--lost-stage", "stop", "--cost", "detection=0.5")
    content = printed_object(*options)["churn"]
    ours = content["methods"]["in the run"]
    assert ours["lost_s"]["interrupted work"] == pytest.approx(0.5 * iteration_s)
    assert ours["lost_s"]["detection"] == 0.5
    assert ours["useful_s"] + sum(ours["lost_s"].values()) == pytest.approx(3 * iteration_s)
    text = output(*options, "--report", str(page))
    assert f"{ours['goodput']:.1%}" in next(line for line in text.splitlines() if "goodput" in line)
    assert "s, 1 loss, " in text
    for name in content["methods"]:
        assert name in page.read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--mtbf", "9", "--churn", "t.csv"), "--churn and --mtbf: give a trace or a mean time"),
        (("--cost", "restart=3"), "--cost: it belongs to a failure trace"),
        (("--rejoin", "3"), "--rejoin: it belongs to a failure trace"),
        (("--mtbf", "9", "--slow", "node-1=2"), "are of one iteration"),
        (("--mtbf", "9", "--cost", "restart"), "--cost restart: expected NAME=SECONDS"),
        (("--mtbf", "9", "--cost", "reboot=1"), "there is no such cost"),
        (("--mtbf", "1e-9", "--duration", "10"), "--mtbf 1e-09: that is 1e+10 losses in 10 s, 100,000 are replayed"),
        (("--mtbf", "nan"), "--mtbf nan: expected a number"),
        (("--churn", "missing.csv"), "missing.csv: no such file"),
    ],
)
def test_mistakes_about_traces_are_told(
    options: tuple[str, ...], words: str, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["simulate", path, *options])
    assert end.value.code == 2
    assert words in capsys.readouterr().err
