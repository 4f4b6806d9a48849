"""A cluster file made of a run's trace: from a simulated iteration on skewed clocks, the true costs come back."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from random_plans import with_relays, with_splits
from simulated_trace import simulated_trace

from skippipe.cluster.measured import measured_cluster, write_measured
from skippipe.cluster.run_trace import MeasuredTask, MeasuredWait, Trace, read_trace
from skippipe_scheduler.errors import ProblemError
from skippipe_scheduler.options import SolveOptions
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.recost import recost
from skippipe_scheduler.plan.simulate import simulate
from skippipe_scheduler.problem.build import build_problem
from skippipe_scheduler.problem.cluster import Cluster, MeasuredFor, load_cluster
from skippipe_scheduler.problem.rules import skip_rules
from skippipe_scheduler.problem.workload import Workload
from skippipe_scheduler.solver.solve import solve

WORKLOAD = Workload(
    num_layers=8,
    layer_forward_flop=1e9,
    loss_flop=2e9,
    activation_bytes=1_000_000,
    layer_gradient_bytes=1000,
    embedding_and_head_gradient_bytes=1000,
    layer_state_bytes=1000,
    embedding_and_head_state_bytes=1000,
    layer_resident_bytes=1000,
    embedding_and_head_resident_bytes=1000,
)


def make_cluster(speeds: tuple[float, ...], link_factor: float = 1.0, overhead_s: float = 0.0) -> Cluster:
    """Return nodes that take `speeds` times as long as others, in two regions."""
    content = {
        "name": "two",
        "task_overhead_s": overhead_s,
        "nodes": [
            {
                "name": f"n{index}",
                "region": "ab"[index % 2],
                "forward_s": 0.1 * speed,
                "backward_s": 0.2 * speed,
                "loss_s": 0.05 * speed,
                "max_in_flight": 8,
            }
            for index, speed in enumerate(speeds)
        ],
        "links": {
            "contention": "none",
            "within_region": {"latency_ms": 1 * link_factor, "gbit_per_s": 8 / link_factor},
            "default": {"latency_ms": 40 * link_factor, "gbit_per_s": 0.5 / link_factor},
        },
    }
    return Cluster.model_validate_json(json.dumps(content))


ASSUMED = make_cluster((1, 1, 1, 1, 1))
TRUE = make_cluster((1, 1.5, 1, 0.8, 1.2), link_factor=1.25, overhead_s=0.002)


@pytest.fixture(scope="module")
def plan() -> Plan:
    problem = build_problem(ASSUMED, WORKLOAD, skip_rules(3), num_microbatches=6)
    return solve(problem, SolveOptions(time_limit_s=5, max_evaluations=200))


def relayed(plan: Plan) -> Plan:
    """Return a plan whose microbatches pass the nodes of `plan`, each of which computes for some of them only."""
    return with_relays(plan, [(0, 1 + index % 2) for index in range(len(plan.microbatches))], plan.rules)


@pytest.mark.parametrize("changed", [lambda plan: plan, relayed], ids=["as_planned", "with_relays"])
def test_true_costs_come_back(plan: Plan, changed: Callable[[Plan], Plan]) -> None:
    plan = changed(plan)
    true_plan = recost(plan, TRUE)
    found = measured_cluster(plan, ASSUMED, simulated_trace(true_plan))
    for node, true in zip(found.members(), TRUE.members(), strict=True):
        assert (node.forward_s, node.backward_s) == pytest.approx((true.forward_s, true.backward_s), rel=1e-3)
        assert node.loss_s == pytest.approx(true.loss_s, rel=1e-3)  # also where no loss runs: as slow as the rest
        assert (node.region, node.max_in_flight) == (true.region, true.max_in_flight)
    assert found.task_overhead_s == pytest.approx(TRUE.task_overhead_s, rel=1e-3)
    again = recost(plan, found)
    used = {(transfer.source, transfer.destination) for transfer in simulate(plan).transfers}
    seen = 0
    for source, destination in used:
        transfer_s = again.costs.transfer_s[source][destination]
        assert transfer_s == pytest.approx(true_plan.costs.transfer_s[source][destination], rel=2e-3) or (
            transfer_s == pytest.approx(plan.costs.transfer_s[source][destination], rel=2e-3)
        )
        seen += transfer_s > 1.2 * plan.costs.transfer_s[source][destination]
    assert seen >= 2
    assert simulate(again).iteration_s == pytest.approx(simulate(true_plan).iteration_s, rel=0.02)


def test_a_split_backward_is_timed_as_one(plan: Plan) -> None:
    whole = simulated_trace(recost(plan, TRUE))
    split = Trace(waits=whole.waits)
    for task in whole.tasks:
        if task.operation == "B":
            middle_s = task.start_s + 0.6 * (task.end_s - task.start_s)
            split.tasks += [task._replace(end_s=middle_s), task._replace(operation="W", start_s=middle_s)]
        else:
            split.tasks.append(task)
    found, expected = (measured_cluster(plan, ASSUMED, trace).members() for trace in (split, whole))
    assert [node.backward_s for node in found] == [node.backward_s for node in expected]


def test_weight_gradients_keep_their_part_of_the_backward(plan: Plan) -> None:
    split = with_splits(plan, 1.0, random.Random(0))
    fast = recost(split, make_cluster((0.01,) * 5))
    parts, found = (
        {node: part_s / costs.backward_s[node] for node, part_s in (costs.weight_s or {}).items()}
        for costs in (split.costs, fast.costs)
    )
    assert found == pytest.approx(parts)
    assert min(task.end_s - task.start_s for task in simulate(fast).tasks) > 0


def test_overhead_is_what_is_left_of_the_gap_before_a_relay(plan: Plan) -> None:
    source, relay = plan.nodes[:2]
    trace = Trace(
        [MeasuredTask(1, relay, "RF", 0, 1.0, 1.0), MeasuredTask(1, relay, "RB", 0, 3.004, 3.004)],
        [
            MeasuredWait(1, source, relay, 0, "forward", 0.0, 1.0),
            MeasuredWait(1, source, relay, 0, "backward", 1.004, 3.004),
        ],
    )
    assert measured_cluster(plan, ASSUMED, trace).task_overhead_s == pytest.approx(0.004)


def test_without_a_trace_costs_stay(plan: Plan) -> None:
    found, assumed = (recost(plan, cluster).costs for cluster in (measured_cluster(plan, ASSUMED, Trace()), ASSUMED))
    assert found.forward_s == pytest.approx(assumed.forward_s)
    assert found.backward_s == pytest.approx(assumed.backward_s)
    assert found.loss_s == pytest.approx(assumed.loss_s)
    for node in plan.nodes:
        assert found.transfer_s[node] == pytest.approx(assumed.transfer_s[node])


def test_files(plan: Plan, tmp_path: Path) -> None:
    trace = simulated_trace(recost(plan, TRUE))
    (tmp_path / "run" / "trace").mkdir(parents=True)
    lines = [json.dumps(task._asdict()) for task in trace.tasks]
    lines += [json.dumps(wait._asdict()) for wait in trace.waits]
    (tmp_path / "run" / "trace" / "rank-0.jsonl").write_text("\n".join([*lines, '{"step": 4, "no']))
    assert read_trace(tmp_path / "run" / "trace") == trace
    from skippipe.cluster.description import write_cluster

    write_cluster(tmp_path / "cluster.yaml", ASSUMED, [])
    facts = MeasuredFor(about="layers: 2 # of 8", dtype="float32", forward_tflop=0.002, loss_tflop=0.002)
    write_measured(tmp_path / "run", plan, tmp_path / "cluster.yaml", facts)
    expected = measured_cluster(plan, ASSUMED, trace).model_copy(update={"measured_for": facts})
    assert load_cluster(tmp_path / "run" / "measured.yaml") == expected
    assert "medians over 2 steps up to step 5" in (tmp_path / "run" / "measured.yaml").read_text()
    write_cluster(tmp_path / "other.yaml", make_cluster((1, 1, 1)), [])
    with pytest.raises(ProblemError, match="its nodes are not those of the plan"):
        write_measured(tmp_path / "run", plan, tmp_path / "other.yaml")


def test_recost_needs_the_same_nodes_and_times(plan: Plan) -> None:
    with pytest.raises(ProblemError, match="node 'n3' is not in both the cluster and the plan"):
        recost(plan, make_cluster((1, 1, 1)))
    rate = ASSUMED.nodes[0].model_copy(
        update={"forward_s": None, "backward_s": None, "loss_s": None, "compute_tflop_per_s": 1.0}
    )
    with pytest.raises(ProblemError, match="node 'n0' has compute_tflop_per_s; give forward_s"):
        recost(plan, ASSUMED.model_copy(update={"nodes": (rate, *ASSUMED.nodes[1:])}))
