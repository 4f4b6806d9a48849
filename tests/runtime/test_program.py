"""Compiled programs: what stands where."""

from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st
from random_plans import random_plan

from skippipe.runtime.program.program import (
    OPERATION_OF_OPCODE,
    TASKS,
    Opcode,
    compile_evaluation,
    compile_programs,
)
from skippipe.runtime.program.verifier import prove, prove_transfers
from skippipe_scheduler.errors import DeadlockError
from skippipe_scheduler.options import SolveOptions
from skippipe_scheduler.plan.plan import Plan, Task
from skippipe_scheduler.plan.validate import validate
from skippipe_scheduler.search.kernel.jit import prepare
from skippipe_scheduler.solver.lost_nodes import replan_without

prepare(None)  # a search without time would not wait for the kernel, nor would those of the tests behind it


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    num_stages = draw(st.integers(2, 5))
    return random_plan(
        draw(st.integers(0, 10_000)),
        num_nodes=draw(st.integers(num_stages, 8)),
        num_stages=num_stages,
        route_length=draw(st.integers(2, num_stages)),
        num_microbatches=draw(st.integers(1, 10)),
        memory=draw(st.integers(1, 4)),
        contention=draw(st.sampled_from(["none", "link", "node"])),
        relays=draw(st.sampled_from([0.0, 0.5])),
    )


@given(plans())
@settings(max_examples=60)
def test_every_plan_compiles_to_proved_programs(plan: Plan) -> None:
    programs = compile_programs(plan, activation_bytes=128)
    proof = prove(programs, plan)
    assert proof.num_transfers == sum(2 * len(microbatch.whole_path) for microbatch in plan.microbatches)
    assert proof.total_bytes == 128 * proof.num_transfers
    for program, peak in zip(programs, proof.peak_memory, strict=True):
        assert peak <= plan.costs.memory[program.node]
        assert [(OPERATION_OF_OPCODE[task.opcode], task.microbatch) for task in program.select(*TASKS)] == [
            *plan.order[program.node]
        ]


@given(plans())
@settings(max_examples=20)
def test_a_plan_without_lost_nodes_compiles_to_proved_programs(plan: Plan) -> None:
    lost = {node for stage in plan.stages for node in stage.nodes[1:]}
    found = replan_without(plan, lost, SolveOptions(time_limit_s=0.0))
    validate(found)
    proof = prove(compile_programs(found, activation_bytes=128), found)
    if lost:
        assert not any(microbatch.relays for microbatch in found.microbatches), "messages go directly"
    assert proof.num_transfers == sum(2 * len(microbatch.whole_path) for microbatch in found.microbatches)
    assert [len(microbatch.route) for microbatch in found.microbatches] == [
        len(microbatch.route) for microbatch in plan.microbatches
    ]


@given(plans(), st.integers(1, 9))
@settings(max_examples=30)
def test_evaluation_visits_every_stage_in_order(plan: Plan, num_microbatches: int) -> None:
    programs = compile_evaluation(plan, 128, num_microbatches)
    prove_transfers(programs)
    visits = Counter(
        (instruction.microbatch, instruction.hop)
        for program in programs
        for instruction in program.select(Opcode.FORWARD)
    )
    assert visits == Counter((m, s) for m in range(num_microbatches) for s in range(len(plan.stages)))
    for program in programs:
        assert all(instruction.hop == program.stage for instruction in program.select(Opcode.FORWARD))
        assert not program.select(Opcode.BACKWARD, Opcode.REDUCE, Opcode.STEP)


def test_evaluation_spreads_over_replicas() -> None:
    plan = random_plan(3, num_nodes=8, num_stages=2, route_length=2)
    programs = compile_evaluation(plan, 128, 12)
    for stage in plan.stages:
        counts = [len(programs[plan.rank_of[node]].select(Opcode.FORWARD)) for node in stage.nodes]
        assert max(counts) - min(counts) <= 1


def test_one_route_in_full() -> None:
    plan = random_plan(0, num_nodes=3, num_stages=3, route_length=3, num_microbatches=1, swaps=0)
    programs = compile_programs(plan, activation_bytes=128)
    origin, second, last = (plan.rank_of[node] for node in plan.microbatches[0].route)
    assert [str(instruction) for instruction in programs[origin].instructions] == [
        "LOAD of microbatch 0 hop 0",
        "FORWARD of microbatch 0 hop 0",
        f"SEND of microbatch 0 hop 0 forward to rank {second}",
        f"RECV of microbatch 0 hop 2 forward from rank {last}",
        "LOSS of microbatch 0 hop 0",
        f"SEND of microbatch 0 hop 2 backward to rank {last}",
        f"RECV of microbatch 0 hop 0 backward from rank {second}",
        "BACKWARD of microbatch 0 hop 0",
        "REDUCE",
        "STEP",
    ]
    assert [str(instruction) for instruction in programs[second].instructions] == [
        f"RECV of microbatch 0 hop 0 forward from rank {origin}",
        "FORWARD of microbatch 0 hop 1",
        f"SEND of microbatch 0 hop 1 forward to rank {last}",
        f"RECV of microbatch 0 hop 1 backward from rank {last}",
        "BACKWARD of microbatch 0 hop 1",
        f"SEND of microbatch 0 hop 0 backward to rank {origin}",
        "REDUCE",
        "STEP",
    ]


def test_one_path_with_a_relay_in_full() -> None:
    plan = next(
        plan
        for plan in (
            random_plan(seed, num_nodes=3, num_stages=3, route_length=2, num_microbatches=1, relays=1.0)
            for seed in range(20)
        )
        if plan.microbatches[0].whole_path[1] in plan.microbatches[0].relays
    )
    programs = compile_programs(plan, activation_bytes=128)
    origin, relay, last = (plan.rank_of[node] for node in plan.microbatches[0].whole_path)
    assert [str(instruction) for instruction in programs[relay].instructions] == [
        f"RECV of microbatch 0 hop 0 forward from rank {origin}",
        "RELAY_FORWARD of microbatch 0 hop 1",
        f"SEND of microbatch 0 hop 1 forward to rank {last}",
        f"RECV of microbatch 0 hop 1 backward from rank {last}",
        "RELAY_BACKWARD of microbatch 0 hop 1",
        f"SEND of microbatch 0 hop 0 backward to rank {origin}",
        "REDUCE",
        "STEP",
    ]
    assert [str(instruction) for instruction in programs[last].instructions[:3]] == [
        f"RECV of microbatch 0 hop 1 forward from rank {relay}",
        "FORWARD of microbatch 0 hop 2",
        f"SEND of microbatch 0 hop 2 forward to rank {origin}",
    ]


@pytest.mark.parametrize("seed", range(5))
def test_send_follows_its_task_at_once(seed: int) -> None:
    for program in compile_programs(random_plan(seed, relays=0.5 * (seed % 2)), 128):
        for before, instruction in zip(program.instructions, program.instructions[1:], strict=False):
            made = any(instruction.microbatch == before.microbatch and before.opcode is opcode for opcode in Opcode)
            if instruction.opcode is Opcode.SEND:
                assert made or before.opcode is Opcode.RECV  # a RECV may fall into the task's planned time


def test_replica_without_microbatch_still_reduces_and_steps() -> None:
    for seed in range(50):
        plan = random_plan(seed, num_nodes=6, num_stages=2, route_length=2, num_microbatches=2)
        programs = compile_programs(plan, 128)
        idle = [program for program in programs if not plan.order[program.node]]
        assert all(
            [instruction.opcode for instruction in program.instructions] == ["REDUCE", "STEP"] for program in idle
        )
        if idle:
            return
    pytest.fail("no random plan had an idle replica")


def test_tags_are_unique_and_shared_by_both_sides() -> None:
    programs = compile_programs(random_plan(4, num_microbatches=12, relays=0.5), 128)
    sent = [instruction.tag for program in programs for instruction in program.select(Opcode.SEND)]
    received = [instruction.tag for program in programs for instruction in program.select(Opcode.RECV)]
    assert len(set(sent)) == len(sent)
    assert sorted(sent) == sorted(received)


def test_order_that_deadlocks_is_refused() -> None:
    plan = random_plan(0, num_nodes=2, num_stages=2, route_length=2, num_microbatches=1)
    other = plan.microbatches[0].route[1]
    broken = plan.model_copy(update={"order": {**plan.order, other: (Task("B", 0), Task("F", 0))}})
    with pytest.raises(DeadlockError, match="waits for the input of the"):
        compile_programs(broken, 128)
