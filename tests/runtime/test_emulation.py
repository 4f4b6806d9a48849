"""With emulation, processes of one machine take the time that the exact simulator predicts for the plan."""

import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from pydantic import ValidationError
from random_plans import random_plan
from ranks import finish_ranks, start_ranks

from skippipe.config.experiment import EmulationOptions
from skippipe.errors import ConfigError
from skippipe.runtime.executors.emulation import Emulation
from skippipe.runtime.program.program import Instruction, Opcode
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.recost import at_pace
from skippipe_scheduler.plan.simulate import TaskSpan, simulate

WORLD_SIZE = 4


def small_plan(seed: int, contention: str, relays: float = 0.0) -> Plan:
    return random_plan(
        seed,
        num_nodes=WORLD_SIZE,
        num_stages=3,
        route_length=2 + seed % 2,
        num_microbatches=4,
        contention=contention,  # type: ignore[arg-type]
        time_scale_s=0.04,
        split=0.5 * (seed % 2),
        relays=relays,
    )


def task_s(span: TaskSpan) -> float:
    return span.end_s - span.start_s


@pytest.mark.slow
def test_measured_time_is_the_simulated_time(tmp_path: Path) -> None:
    plans = {
        f"{contention}-{seed}": small_plan(seed, contention) for seed in range(2) for contention in ("none", "link")
    }
    plans["relayed"] = small_plan(2, "link", relays=0.7)
    assert sum(len(microbatch.relays) for microbatch in plans["relayed"].microbatches) > 3
    plans["dynamic"] = plans["none-1"]
    for name, plan in plans.items():
        plan.save(tmp_path / f"{name}.plan.json")
        comm = {"executor": "dynamic" if name == "dynamic" else "static"}
        options = {"emulation": {"links": True, "compute": True}, "comm": comm}
        (tmp_path / f"{name}.options.json").write_text(json.dumps(options))
    results = finish_ranks(start_ranks(tmp_path, "emulated", WORLD_SIZE), timeout_s=100)
    assert [code for code, _ in results] == [0] * WORLD_SIZE, results
    for name, plan in plans.items():
        timeline = simulate(plan)
        measured = [json.loads((tmp_path / f"{name}.plan.json.{rank}.json").read_text()) for rank in range(WORLD_SIZE)]
        # The slowest rank of each iteration, and the median iteration: the first one warms up.
        durations_s = [
            max(times) for times in zip(*(measurement["durations_s"] for measurement in measured), strict=True)
        ]
        planned = {(span.node, span.operation, span.microbatch): span for span in timeline.tasks}
        if name == "dynamic":  # where this machine is late itself, the order and its time may be others than the plan's
            ran = [span for measurement in measured for span in measurement["spans"] if span[1] != "REDUCE"]
            assert sorted(tuple(span[:3]) for span in ran) == sorted(planned)
            assert all(end_s - start_s >= 0.999 * task_s(planned[*what]) for *what, start_s, end_s in ran)
            continue
        assert statistics.median(durations_s) == pytest.approx(timeline.iteration_s, rel=0.1), name
        assert min(durations_s) >= timeline.iteration_s * 0.97
        for node, operation, microbatch, start_s, end_s in (
            span for measurement in measured for span in measurement["spans"]
        ):
            if operation != "REDUCE":
                expected = planned[node, operation, microbatch]
                assert end_s - start_s >= task_s(expected) * 0.999
                assert start_s >= expected.start_s - 1e-6


def task(opcode: Opcode, microbatch: int = 0) -> Instruction:
    return Instruction(opcode, microbatch)


def send_to(rank: int, microbatch: int = 0) -> Instruction:
    return Instruction(Opcode.SEND, microbatch, 0, "forward", rank)


def emulation_of(plan: Plan, node: str, **options: bool) -> Emulation:
    emulation = Emulation(plan, node, EmulationOptions.model_validate(options))
    emulation.start_iteration(0)
    return emulation


def test_messages_queue_on_their_link_only_where_the_plan_says_so() -> None:
    for contention in ("none", "link", "node"):
        plan = small_plan(0, contention)
        source, destination, other = plan.nodes[:3]
        emulation = emulation_of(plan, source, links=True, compute=True)
        first, second = (emulation.deliver_ns(send_to(1)) for _ in range(2))
        elsewhere = emulation.deliver_ns(send_to(2))
        occupied_s = plan.costs.occupancy_s(source, destination)
        assert first * 1e-9 == pytest.approx(plan.costs.transfer_s[source][destination])
        assert (second - first) * 1e-9 == pytest.approx(occupied_s, abs=1e-8)
        waits_s = 2 * occupied_s if contention == "node" else 0.0
        assert elsewhere * 1e-9 == pytest.approx(plan.costs.transfer_s[source][other] + waits_s)


def test_links_that_share_capacities_are_not_emulated() -> None:
    plan = small_plan(0, "shared")
    with pytest.raises(ConfigError, match=r"emulation\.links: the plan has contention shared, .* shape real links"):
        emulation_of(plan, plan.nodes[0], links=True)
    assert emulation_of(plan, plan.nodes[0], compute=True).end_ns == 0


def test_links_alone_leave_tasks_as_they_are() -> None:
    plan = small_plan(0, "none")
    emulation = emulation_of(plan, plan.nodes[0], links=True)
    start_ns = emulation.begin(0)
    assert emulation.finish(task(Opcode.BACKWARD)) - start_ns < 0.5e9 * plan.costs.backward_s[plan.nodes[0]]


def test_compute_alone_delivers_at_the_end_of_the_task() -> None:
    plan = small_plan(0, "link")
    emulation = emulation_of(plan, plan.nodes[0], compute=True)
    emulation.begin(0)
    assert emulation.deliver_ns(send_to(1)) == 0
    assert emulation.finish(task(Opcode.FORWARD)) == emulation.deliver_ns(send_to(1))


def test_each_part_of_a_split_backward_takes_its_own_time() -> None:
    plan = random_plan(2, split=0.5, time_scale_s=0.01)
    node = next(node for node, split in plan.split_of.items() if split)
    (split, *_), weight_s = plan.split_of[node], (plan.costs.weight_s or {})[node]
    whole = max(microbatch.id for microbatch in plan.microbatches if microbatch.id not in plan.split_of[node])
    emulation = emulation_of(plan, node, compute=True)
    emulation.start_iteration(time.monotonic_ns())
    taken_s = {}
    for opcode, microbatch in ((Opcode.BACKWARD, split), (Opcode.WEIGHT, split), (Opcode.BACKWARD, whole)):
        start_ns = emulation.begin(0)
        taken_s[opcode, microbatch] = (emulation.finish(task(opcode, microbatch)) - start_ns) * 1e-9
    assert taken_s[Opcode.WEIGHT, split] == pytest.approx(weight_s, abs=1e-8)
    assert taken_s[Opcode.BACKWARD, split] == pytest.approx(plan.costs.backward_s[node] - weight_s, abs=1e-8)
    assert taken_s[Opcode.BACKWARD, whole] == pytest.approx(plan.costs.backward_s[node], abs=1e-8)


def test_lateness_does_not_add_up_over_relays() -> None:
    plan = small_plan(0, "none")
    emulation = emulation_of(plan, plan.nodes[0], links=True, compute=True)
    start_ns = time.monotonic_ns()
    emulation.start_iteration(start_ns)
    for number in range(3):
        planned_ns = start_ns + number * round(plan.costs.task_overhead_s * 1e9)
        assert emulation.begin(0) == planned_ns
        time.sleep(0.001)  # it passes the message on, which takes no time in the plan
        assert emulation.finish(task(Opcode.RELAY_FORWARD)) == planned_ns


def test_jitter_depends_on_what_and_which_iteration_not_on_when() -> None:
    plan = small_plan(0, "none")
    node = plan.nodes[0]
    options = {"links": True, "compute": True, "jitter_sigma": 0.6}

    def durations_s(order: Sequence[int], **more: int) -> dict[str, float]:
        emulation = Emulation(plan, node, EmulationOptions.model_validate(options | {"seed": more.get("seed", 0)}))
        emulation.start_iteration(0, more.get("iteration", 1))
        found: dict[str, float] = {}
        for microbatch in order:
            found[f"transfer {microbatch}"] = emulation.deliver_ns(send_to(1, microbatch)) - emulation.end_ns
            found[f"task {microbatch}"] = emulation._jitter(node, "F", microbatch)
        return found

    once = durations_s(range(40))
    assert durations_s(range(39, -1, -1)) == once
    assert durations_s(range(40), iteration=2) != once
    assert durations_s(range(40), seed=1) != once
    factors = [value for name, value in once.items() if name.startswith("task")]
    assert statistics.median(factors) == pytest.approx(1.0, abs=0.3)
    assert statistics.stdev(map(math.log, factors)) == pytest.approx(0.6, abs=0.15)


def test_on_real_links_a_message_is_there_when_it_is_there() -> None:
    plan = small_plan(0, "link")
    emulation = emulation_of(plan, plan.nodes[0], compute=True)
    sent_ns = time.monotonic_ns()
    emulation.start_iteration(sent_ns)
    time.sleep(0.02)  # the message is on its way
    assert emulation.begin(sent_ns) >= sent_ns + 20_000_000
    task_ns = round(plan.costs.forward_s[plan.nodes[0]] * 1e9)
    end_ns = emulation.finish(task(Opcode.FORWARD))
    assert end_ns >= sent_ns + 20_000_000 + task_ns
    assert time.monotonic_ns() >= end_ns  # nothing leaves before


def test_a_node_turns_slow_at_a_step_and_fast_again_whatever_the_plan_has_learned() -> None:
    plan = random_plan(2)
    node, other = plan.nodes[:2]
    changes = [{"node": node, "step": 3, "factor": 2.0}, {"node": node, "step": 5, "factor": 1.0}]
    options = EmulationOptions.model_validate({"links": True, "compute": True, "paces": changes})
    learned = at_pace(plan, {node: 2.0})

    def forward_s(emulation: Emulation, step: int) -> float:
        emulation.start_iteration(time.monotonic_ns(), step)
        start_ns = emulation.begin(0)
        return (emulation.finish(task(Opcode.FORWARD)) - start_ns) * 1e-9

    for name, factor in ((node, 2.0), (other, 1.0)):
        planned_s = plan.costs.forward_s[name]
        expected = [planned_s * pace for pace in (1.0, 1.0, factor, factor, 1.0)]
        before = [forward_s(Emulation(plan, name, options), step) for step in range(1, 6)]
        pace = learned.costs.forward_s[name] / planned_s
        after = [forward_s(Emulation(learned, name, options, pace), step) for step in range(1, 6)]
        assert before == pytest.approx(expected, abs=1e-8)
        assert after == pytest.approx(expected, abs=1e-8)


def test_a_link_turns_slow_both_ways_whatever_the_plan_has_learned() -> None:
    plan = small_plan(0, "none")
    one, other, third = plan.nodes[:3]
    changes = [{"node": one, "to": other, "step": 3, "factor": 2.0}]
    options = EmulationOptions.model_validate({"links": True, "paces": changes})
    learned = at_pace(plan, {}, {(one, other): 2.0, (other, one): 2.0})

    def transfer_s(emulation: Emulation, rank: int, step: int) -> float:
        emulation.start_iteration(0, step)
        return (emulation.deliver_ns(send_to(rank)) - emulation.end_ns) * 1e-9

    for source, rank, factor in ((one, 1, 2.0), (other, 0, 2.0), (one, 2, 1.0), (third, 0, 1.0)):
        sink = plan.nodes[rank]
        pace = {sink: learned.costs.transfer_s[source][sink] / plan.costs.transfer_s[source][sink]}
        for emulation in (Emulation(plan, source, options), Emulation(learned, source, options, link_pace=pace)):
            planned_s = plan.costs.transfer_s[source][sink]
            assert [transfer_s(emulation, rank, step) for step in (2, 3)] == pytest.approx(
                [planned_s, factor * planned_s], abs=1e-8
            )


def test_paces_need_emulated_tasks() -> None:
    with pytest.raises(ValidationError, match="set compute: true"):
        EmulationOptions.model_validate({"paces": [{"node": "a", "step": 1, "factor": 2.0}]})
