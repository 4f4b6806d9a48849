"""Each check of the proof fails on programs that were broken on purpose, and says where."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from random_plans import random_plan

from skippipe.errors import ProgramError
from skippipe.runtime.program.program import Instruction, Opcode, Program, compile_programs
from skippipe.runtime.program.verifier import prove, prove_transfers
from skippipe_scheduler.plan.plan import Plan

PLAN = random_plan(1, num_nodes=5, num_stages=3, route_length=3, num_microbatches=6)


def edited(rank: int, edit: Callable[[list[Instruction]], list[Instruction]], plan: Plan = PLAN) -> tuple[Program, ...]:
    """Return the plan's programs with one rank's list changed."""
    programs = list(compile_programs(plan, 128))
    programs[rank] = replace(programs[rank], instructions=tuple(edit(list(programs[rank].instructions))))
    return tuple(programs)


def first(instructions: Sequence[Instruction], opcode: Opcode) -> int:
    return next(index for index, instruction in enumerate(instructions) if instruction.opcode is opcode)


def without_first(opcode: Opcode) -> Callable[[list[Instruction]], list[Instruction]]:
    def edit(instructions: list[Instruction]) -> list[Instruction]:
        del instructions[first(instructions, opcode)]
        return instructions

    return edit


def with_first(opcode: Opcode, /, **changes: object) -> Callable[[list[Instruction]], list[Instruction]]:
    def edit(instructions: list[Instruction]) -> list[Instruction]:
        index = first(instructions, opcode)
        instructions[index] = replace(instructions[index], **changes)  # type: ignore[arg-type]
        return instructions

    return edit


def moved_first(opcode: Opcode, position: int) -> Callable[[list[Instruction]], list[Instruction]]:
    def edit(instructions: list[Instruction]) -> list[Instruction]:
        one = instructions.pop(first(instructions, opcode))
        instructions.insert(position if position >= 0 else len(instructions), one)
        return instructions

    return edit


ORIGIN = PLAN.rank_of[PLAN.microbatches[0].route[0]]
INNER = PLAN.rank_of[PLAN.microbatches[0].route[1]]


@pytest.mark.parametrize(
    ("rank", "edit", "message"),
    [
        (INNER, without_first(Opcode.RECV), r"waits in SEND .* has no RECV with tag"),
        (INNER, without_first(Opcode.SEND), r"waits in RECV .* has no SEND with tag"),
        (INNER, with_first(Opcode.RECV, size_bytes=64), r"128 bytes at rank \d but 64 at rank \d"),
        (INNER, with_first(Opcode.RECV, hop=7), r"under the same tag"),
        (INNER, with_first(Opcode.SEND, peer=INNER), r"no such peer among 5 ranks"),
        (INNER, with_first(Opcode.SEND, peer=5), r"no such peer among 5 ranks"),
        (INNER, with_first(Opcode.SEND, tag=2**30), r"tag 1073741824 is not in"),
        (INNER, moved_first(Opcode.SEND, 0), r"SEND .* comes before an output to send|differ in order"),
        (ORIGIN, without_first(Opcode.LOAD), r"FORWARD .* comes before its LOAD"),
        (INNER, moved_first(Opcode.FORWARD, 0), r"FORWARD .* comes before its RECV \(forward\)"),
        (INNER, moved_first(Opcode.BACKWARD, 0), r"BACKWARD .* comes before its FORWARD"),
        (INNER, without_first(Opcode.REDUCE), r"has 0 REDUCE instructions, expected 1"),
        (INNER, lambda old: [*old, old[-1]], r"has 2 STEP instructions, expected 1"),
        (INNER, moved_first(Opcode.STEP, 0), r"must end with REDUCE, then STEP"),
        (INNER, lambda old: [*old[:-2], old[-1], old[-2]], r"must end with REDUCE, then STEP"),
        (ORIGIN, moved_first(Opcode.BACKWARD, -1), r"must end with REDUCE|does not run the plan's tasks"),
    ],
)
def test_broken_program_is_refused(
    rank: int, edit: Callable[[list[Instruction]], list[Instruction]], message: str
) -> None:
    with pytest.raises(ProgramError, match=message):
        prove(edited(rank, edit), PLAN)


RELAYED = random_plan(3, num_nodes=5, num_stages=4, route_length=2, num_microbatches=1, relays=1.0)
RELAY = RELAYED.rank_of[min(RELAYED.microbatches[0].relays)]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without_first(Opcode.RECV), r"waits in SEND .* has no RECV with tag"),
        (without_first(Opcode.SEND), r"waits in RECV .* has no SEND with tag"),
        (moved_first(Opcode.RECV, 1), r"RELAY_FORWARD .* comes before its RECV \(forward\)"),
        (moved_first(Opcode.SEND, 1), r"SEND .* comes before an output to send"),
        (moved_first(Opcode.RELAY_BACKWARD, 3), r"RELAY_BACKWARD .* comes before its RECV \(backward\)"),
        (moved_first(Opcode.RELAY_BACKWARD, 0), r"RELAY_BACKWARD .* comes before its RELAY_FORWARD"),
        (without_first(Opcode.RELAY_FORWARD), r"SEND .* comes before an output to send"),
        (with_first(Opcode.RELAY_FORWARD, opcode=Opcode.FORWARD), r"RELAY_BACKWARD .* comes before its RELAY_FORWARD"),
        (with_first(Opcode.RELAY_FORWARD, hop=0), r"RELAY_FORWARD .* is not at this place on the path \('node-"),
        (with_first(Opcode.RELAY_BACKWARD, hop=7), r"RELAY_BACKWARD .* is not at this place on the path"),
        (moved_first(Opcode.STEP, 0), r"must end with REDUCE, then STEP, after its last task"),
    ],
)
def test_broken_relay_is_refused(edit: Callable[[list[Instruction]], list[Instruction]], message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        prove(edited(RELAY, edit, RELAYED), RELAYED)


def test_a_relay_out_of_its_turn_is_refused() -> None:
    plan = random_plan(0, num_nodes=4, num_stages=4, route_length=2, num_microbatches=6, relays=1.0)
    node = next(node for node, tasks in plan.order.items() if tasks[-2].operation == "RB")
    *others, relay, last = plan.order[node]
    exchanged = plan.model_copy(update={"order": {**plan.order, node: (*others, last, relay)}})
    prove(compile_programs(exchanged, 128), exchanged)
    with pytest.raises(ProgramError, match=rf"\({node}\) does not run the plan's tasks: the order differs"):
        prove(compile_programs(exchanged, 128), plan)


def test_what_is_relayed_counts_for_no_memory() -> None:
    programs = compile_programs(RELAYED, 128)
    assert prove(programs, RELAYED).peak_memory == tuple(
        int(node in RELAYED.microbatches[0].route) for node in RELAYED.nodes
    )


def test_doubled_tag_is_refused() -> None:
    def double(instructions: list[Instruction]) -> list[Instruction]:
        index = first(instructions, Opcode.RECV)
        return [*instructions[:index], instructions[index], *instructions[index:]]

    with pytest.raises(ProgramError, match="is used twice on this pair"):
        prove(edited(INNER, double), PLAN)


def test_memory_bound_is_proved() -> None:
    proof = prove(compile_programs(PLAN, 128), PLAN)
    rank = max(range(5), key=lambda rank: proof.peak_memory[rank])
    assert proof.peak_memory[rank] > 1
    memory = {**PLAN.costs.memory, PLAN.nodes[rank]: proof.peak_memory[rank] - 1}
    tight = PLAN.model_copy(update={"costs": PLAN.costs.model_copy(update={"memory": memory})})
    with pytest.raises(ProgramError, match=rf"rank {rank} .* holds {proof.peak_memory[rank]} .* memory allows"):
        prove(compile_programs(tight, 128), tight)


def test_task_of_another_order_is_refused() -> None:
    other = random_plan(1, num_nodes=5, num_stages=3, route_length=3, num_microbatches=5)
    with pytest.raises(ProgramError, match="does not run the plan's tasks: look at"):
        prove(compile_programs(PLAN, 128), other)


def test_programs_for_other_nodes_are_refused() -> None:
    other = random_plan(1, num_nodes=6, num_stages=3, route_length=3, num_microbatches=6)
    with pytest.raises(ProgramError, match="programs are for 5 nodes, the plan has 6"):
        prove(compile_programs(PLAN, 128), other)


def crossing(first_opcodes: tuple[Opcode, Opcode]) -> tuple[Program, ...]:
    """Two ranks that each have one thing to send and one to receive, in the order given for each."""

    def transfers(rank: int) -> list[Instruction]:
        peer = 1 - rank
        both = [
            Instruction(Opcode.SEND, rank, 0, "forward", peer, 8, rank),
            Instruction(Opcode.RECV, peer, 0, "forward", peer, 8, peer),
        ]
        return both if first_opcodes[rank] is Opcode.SEND else both[::-1]

    return tuple(
        Program(
            rank,
            f"node-{rank}",
            0,
            (Instruction(Opcode.LOAD, rank, 0), Instruction(Opcode.FORWARD, rank, 0), *transfers(rank)),
        )
        for rank in range(2)
    )


def test_crossing_transfers_deadlock_only_when_both_send_first() -> None:
    prove_transfers(crossing((Opcode.SEND, Opcode.RECV)))
    with pytest.raises(ProgramError) as raised:
        prove_transfers(crossing((Opcode.SEND, Opcode.SEND)))
    assert str(raised.value) == (
        "ranks wait for each other: rank 0 (node-0) waits in SEND of microbatch 0 hop 0 forward to rank 1; "
        "rank 1 (node-1) waits in SEND of microbatch 1 hop 0 forward to rank 0"
    )


def test_different_order_on_both_sides_of_a_pair_is_refused() -> None:
    plan = random_plan(0, num_nodes=2, num_stages=2, route_length=2, num_microbatches=4, memory=4)

    def swap(instructions: list[Instruction]) -> list[Instruction]:
        indices = [index for index, instruction in enumerate(instructions) if instruction.opcode is Opcode.RECV]
        same = [index for index in indices if instructions[index].direction == "backward"]
        instructions[same[0]], instructions[same[1]] = instructions[same[1]], instructions[same[0]]
        return instructions

    with pytest.raises(ProgramError, match=r"differ in order: at number 0 rank \d sends tag \d+"):
        prove(edited(1, swap, plan), plan)


def swapped_receives() -> tuple[Program, ...]:
    """Rank 0 sends microbatch 0, then 1; rank 1 receives them the other way round."""
    sends, receives = (
        [Instruction(opcode, microbatch, 0, "forward", peer, 8, microbatch) for microbatch in microbatches]
        for opcode, peer, microbatches in ((Opcode.SEND, 1, (0, 1)), (Opcode.RECV, 0, (1, 0)))
    )
    made = [Instruction(opcode, microbatch, 0) for microbatch in range(2) for opcode in (Opcode.LOAD, Opcode.FORWARD)]
    return Program(0, "node-0", 0, (*made, *sends)), Program(1, "node-1", 1, tuple(receives))


def test_what_needs_tags_is_refused_where_messages_match_by_order() -> None:
    assert prove_transfers(swapped_receives(), "tags").num_transfers == 2
    with pytest.raises(
        ProgramError,
        match="the forward transfers from rank 0 to rank 1 differ in order: at number 0 rank 0 sends tag 0",
    ):
        prove_transfers(swapped_receives(), "order")
    both_send_first = crossing((Opcode.SEND, Opcode.SEND))
    assert prove_transfers(both_send_first, "tags").num_transfers == 2
    with pytest.raises(ProgramError, match="ranks wait for each other"):
        prove_transfers(both_send_first, "order")


def test_ranks_that_both_wait_first_are_refused_with_tags_too() -> None:
    with pytest.raises(ProgramError, match=r"ranks wait for each other: rank 0 .* waits in RECV"):
        prove_transfers(crossing((Opcode.RECV, Opcode.RECV)), "tags")
