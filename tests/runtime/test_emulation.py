"""With emulation, processes of one machine take the time that the exact simulator predicts for the plan."""

import json
import statistics
import time
from pathlib import Path

import pytest
from random_plans import random_plan
from ranks import finish_ranks, start_ranks

from skippipe.config import EmulationOptions
from skippipe.runtime.emulation import Emulation
from skippipe_scheduler.plan import Plan
from skippipe_scheduler.simulate import simulate

WORLD_SIZE = 4


def small_plan(seed: int, contention: str) -> Plan:
    return random_plan(
        seed,
        num_nodes=WORLD_SIZE,
        num_stages=3,
        route_length=2 + seed % 2,
        num_microbatches=4,
        contention=contention,  # type: ignore[arg-type]
        time_scale_s=0.04,
    )


@pytest.mark.slow
def test_measured_time_is_the_simulated_time(tmp_path: Path) -> None:
    plans = {
        f"{contention}-{seed}": small_plan(seed, contention) for seed in range(2) for contention in ("none", "link")
    }
    for name, plan in plans.items():
        plan.save(tmp_path / f"{name}.plan.json")
    results = finish_ranks(start_ranks(tmp_path, "emulated", WORLD_SIZE), timeout_s=100)
    assert [code for code, _ in results] == [0] * WORLD_SIZE, results
    for name, plan in plans.items():
        timeline = simulate(plan)
        measured = [json.loads((tmp_path / f"{name}.plan.json.{rank}.json").read_text()) for rank in range(WORLD_SIZE)]
        # The slowest rank of each iteration, and the median iteration: the first one warms up.
        durations_s = [max(times) for times in zip(*(one["durations_s"] for one in measured), strict=True)]
        assert statistics.median(durations_s) == pytest.approx(timeline.iteration_s, rel=0.1), name
        assert min(durations_s) >= timeline.iteration_s * 0.97
        planned = {(span.node, span.operation, span.microbatch): span for span in timeline.tasks}
        for node, operation, microbatch, start_s, end_s in (span for one in measured for span in one["spans"]):
            if operation != "REDUCE":
                expected = planned[node, operation, microbatch]
                assert end_s - start_s >= (expected.end_s - expected.start_s) * 0.999
                assert start_s >= expected.start_s - 1e-6


def emulation_of(plan: Plan, node: str, **options: bool) -> Emulation:
    emulation = Emulation(plan, node, EmulationOptions.model_validate(options))
    emulation.start_iteration(0)
    return emulation


def test_messages_queue_on_their_link_only_where_the_plan_says_so() -> None:
    for contention in ("none", "link", "node"):
        plan = small_plan(0, contention)
        source, destination, other = plan.nodes[:3]
        emulation = emulation_of(plan, source, links=True, compute=True)
        first, second = (emulation.deliver_ns(destination) for _ in range(2))
        elsewhere = emulation.deliver_ns(other)
        occupied_s = plan.costs.occupancy_s(source, destination)
        assert first * 1e-9 == pytest.approx(plan.costs.transfer_s[source][destination])
        assert (second - first) * 1e-9 == pytest.approx(occupied_s, abs=1e-8)
        waits_s = 2 * occupied_s if contention == "node" else 0.0
        assert elsewhere * 1e-9 == pytest.approx(plan.costs.transfer_s[source][other] + waits_s)


def test_links_alone_leave_tasks_as_they_are() -> None:
    plan = small_plan(0, "none")
    emulation = emulation_of(plan, plan.nodes[0], links=True)
    start_ns = emulation.begin(0)
    assert emulation.finish("B") - start_ns < 0.5e9 * plan.costs.backward_s[plan.nodes[0]]


def test_compute_alone_delivers_at_the_end_of_the_task() -> None:
    plan = small_plan(0, "link")
    emulation = emulation_of(plan, plan.nodes[0], compute=True)
    emulation.begin(0)
    assert emulation.deliver_ns(plan.nodes[1]) == 0
    assert emulation.finish("F") == emulation.deliver_ns(plan.nodes[1])


def test_on_real_links_a_message_is_there_when_it_is_there() -> None:
    plan = small_plan(0, "link")
    emulation = emulation_of(plan, plan.nodes[0], compute=True)
    sent_ns = time.monotonic_ns()
    emulation.start_iteration(sent_ns)
    time.sleep(0.02)  # the message is on its way
    assert emulation.begin(sent_ns) >= sent_ns + 20_000_000
    task_ns = round(plan.costs.forward_s[plan.nodes[0]] * 1e9)
    end_ns = emulation.finish("F")
    assert end_ns >= sent_ns + 20_000_000 + task_ns
    assert time.monotonic_ns() >= end_ns  # nothing leaves before
