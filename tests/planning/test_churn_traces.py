"""Failure traces: from files of every format, drawn, and put on the nodes of a plan."""

import json
import math
from pathlib import Path
from statistics import mean

import pytest
from random_plans import random_plan

from skippipe.errors import InputError
from skippipe.planning.churn.failure_trace import FailureTrace, NodeChange, drawn_losses, drawn_stage_losses
from skippipe.planning.churn.machine_counts import MachineChange, on_nodes
from skippipe.planning.churn.trace_files import load_trace

PLAN = random_plan(3, num_nodes=9, num_stages=4, num_microbatches=8)


def read(tmp_path: Path, text: str, name: str = "trace.csv", rejoin_s: float = 0.0) -> FailureTrace:
    (tmp_path / name).write_text(text)
    return load_trace(tmp_path / name, PLAN, rejoin_s=rejoin_s)


def numbers(trace: FailureTrace) -> list[tuple[float, int, int]]:
    return [(change.time_s, len(change.lost), len(change.back)) for change in trace.changes]


def test_a_simple_file_names_the_nodes(tmp_path: Path) -> None:
    text = "time_s,node,event\n40,node-2,back\n10,node-2,lost\n10,node-5,lost\n100,,end\n"
    trace = read(tmp_path, text)
    expected = (NodeChange(10.0, frozenset({"node-2", "node-5"})), NodeChange(40.0, back=frozenset({"node-2"})))
    assert trace == FailureTrace(100.0, expected)
    assert (trace.mtbf_s, trace.num_losses) == (100.0, 1)
    assert trace.present_share(PLAN.nodes) == pytest.approx((9 * 10 + 7 * 30 + 8 * 60) / (9 * 100))
    assert trace.until(20.0) == FailureTrace(20.0, expected[:1])


PUBLIC = {
    "bamboo.csv": "0,add,a\n0,add,b\n5000,add,c\n5000,add,d\n9000,remove,a\n20000,remove,c\n20000,add,e\n65000,add,f\n",
    "sailor.json": json.dumps([{"Time": time_s, "GPUs": count} for time_s, count in ((5, 8), (9, 6), (65.0, 8))]),
    "counts.csv": "0,0\n5,0\n5,4\n9,4\n9,3\n65,3\n65,4\n",
    "counts.txt": "2021-12-11, 11:00:05, 4\n2021-12-11, 11:00:09, 3\n\n2021-12-11, 11:01:05, 4\n",
}
"""A quarter of the machines goes after 4 s and is back after a minute; in the first, another is replaced at once."""


@pytest.mark.parametrize("name", PUBLIC)
def test_public_formats_tell_which_share_of_the_nodes_is_there(name: str, tmp_path: Path) -> None:
    trace = read(tmp_path, PUBLIC[name], name)
    assert trace.duration_s == 60.0
    replaced = [(15.0, 2, 2)] if name == "bamboo.csv" else []  # half of the machines are there for a moment
    assert numbers(trace) == [(4.0, 3, 0), *replaced]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("own.csv", "100,node-2,lost\n"),
        ("bamboo.csv", "0,add,a\n0,add,b\n100000,remove,b\n"),
        ("counts.csv", "0,4\n100,3\n"),
        ("sailor.json", '[{"Time": 0, "GPUs": 4}, {"Time": 100, "GPUs": 3}]'),
    ],
)
def test_a_loss_at_the_end_of_a_file_counts_where_the_trace_goes_on(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert load_trace(tmp_path / name, PLAN).num_losses == 0  # it ends there
    trace = load_trace(tmp_path / name, PLAN, duration_s=600.0)
    assert (trace.duration_s, trace.num_losses) == (600.0, 1)
    assert trace.present_share(PLAN.nodes) < 1


def test_hours_are_read_as_hours(tmp_path: Path) -> None:
    assert read(tmp_path, "0.5,4\n1.0,2\n1.5,4\n", "aws-hours.csv").duration_s == 3600.0


def test_nodes_that_fail_with_their_stage_do_so_here(tmp_path: Path) -> None:
    content = {str(node): [3, 50] if 2 <= node < 4 else [50] for node in range(8)}
    trace = read(tmp_path, json.dumps(content), "failures.json", rejoin_s=7.0)
    nodes = [node for stage in PLAN.stages for node in stage.nodes]
    iteration_s = PLAN.predicted.iteration_s
    lost = frozenset(node for index, node in enumerate(nodes) if index * 8 // 9 in (2, 3))
    assert trace.changes == (NodeChange(3 * iteration_s, lost), NodeChange(3 * iteration_s + 7.0, back=lost))
    assert trace.duration_s == 50 * iteration_s
    at_once = read(tmp_path, json.dumps(content), "failures.json")
    assert at_once.changes == (NodeChange(3 * iteration_s, lost, lost),)


def test_a_node_that_is_away_does_not_fail_again(tmp_path: Path) -> None:
    content = {str(node): [3, 5, 20, 50] if node == 4 else [50] for node in range(9)}
    iteration_s = PLAN.predicted.iteration_s
    trace = read(tmp_path, json.dumps(content), "failures.json", rejoin_s=4 * iteration_s)
    lost = frozenset({[node for stage in PLAN.stages for node in stage.nodes][4]})
    assert [change.time_s / iteration_s for change in trace.changes] == pytest.approx([3, 7, 20, 24])
    assert [(change.lost, change.back) for change in trace.changes] == [(lost, frozenset()), (frozenset(), lost)] * 2


def test_names_with_a_comma_are_quoted(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the plan has no node 'rack 3, slot 1'"):
        read(tmp_path, '1, "rack 3, slot 1", lost\n9,,end\n')


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("time_s,node,event\n1,node-99,lost\n9,,end\n", "the plan has no node 'node-99'"),
        ("1,node-1,back\n9,,end\n", "'node-1' is back at 1 s, but it is there already"),
        ("1,node-1,lost\n2,node-1,lost\n", "'node-1' is lost at 2 s, but it is lost already"),
        ("-1,node-1,lost\n9,,end\n", "before the trace begins"),
        ("x,node-1,lost\n", "trace.csv:1: 'x' is not a number"),
        ("nan,node-1,lost\n", "trace.csv:1: 'nan' is no time"),
        ("0,4\n5,inf\n", "trace.csv:2: 'inf' is no time and no number of machines"),
        ("0,4\n5,2.5\n", "trace.csv:2: '2.5' is no number of machines"),
        ('[{"Time": 0, "GPUs": 1e400}]', r"not a known trace \(0.GPUs: Input should be a finite number"),
        ("[" * 3000, "nested too deeply"),
        ("", "there is never a machine"),
        ("1\n", "trace.csv:1: '1' is no row of a known trace"),
        ("1,4\n2,add,a\n", "one file has one format"),
        ("0,remove,a\n", "more machines have gone than had come at 0 s"),
        ("soon, 11:00:00, 4\n", "soon, 11:00:00 is no date and time"),
        ('[{"time": 3}]', "not a known trace"),
        ('{"1": [3, 4]}', "expected nodes 0, 1, 2"),
        ("0,node-1,lost\n", "the trace is 0 s long"),
    ],
)
def test_what_is_wrong_in_a_file_is_said(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        read(tmp_path, text)


def test_a_machine_that_comes_goes_where_least_is_left() -> None:
    machines = [MachineChange(0, 0, 9), MachineChange(1, 7, 0), *(MachineChange(2 + n, 0, 1) for n in range(5))]
    trace = on_nodes(machines, PLAN, "trace", seed=2)
    away = set(trace.changes[0].lost)
    for change in trace.changes[1:]:
        (node,) = change.back
        shares = {
            other: sum(held not in away for held in stage.nodes) / len(stage.nodes)
            for stage in PLAN.stages
            for other in stage.nodes
        }
        assert shares[node] == min(shares[other] for other in away)
        away.remove(node)


def test_drawn_losses_follow_the_seed_and_the_mean() -> None:
    trace = drawn_losses(PLAN.nodes, 60.0, 60_000.0, rejoin_s=20.0, seed=1)
    assert trace == drawn_losses(PLAN.nodes, 60.0, 60_000.0, rejoin_s=20.0, seed=1)
    assert trace != drawn_losses(PLAN.nodes, 60.0, 60_000.0, rejoin_s=20.0, seed=2)
    assert trace.mtbf_s == pytest.approx(60.0, rel=0.1)
    assert trace.present_share(PLAN.nodes) == pytest.approx(1 - 20 / 60 / 9, abs=0.01)
    assert sum(len(change.lost) for change in drawn_losses(PLAN.nodes, 1.0, 1000.0, seed=3).changes) == 9


def test_stages_are_lost_whole_and_never_the_first() -> None:
    trace = drawn_stage_losses(PLAN, 0.33, 3600.0 * 500, rejoin_s=30.0, seed=4)
    stages = [{*stage.nodes} for stage in PLAN.stages]
    assert {stages.index({*change.lost}) for change in trace.changes if change.lost} == {1, 2, 3}
    assert trace.num_losses / 500 == pytest.approx(-math.log(1 - 0.33), rel=0.2)
    gaps = [change.time_s for change in trace.changes]
    assert mean(later - earlier for earlier, later in zip(gaps[::2], gaps[1::2], strict=False)) == pytest.approx(30.0)
