"""The proof of a set of programs before anything runs. No torch here.

Proved: every SEND has one RECV of equal bytes; inputs are received and outputs made before they are used, also where
a relay makes its output of nothing but its input; tasks are the plan's, in the plan's order, each at its node's place
on the path, each WEIGHT behind its BACKWARD; memory high-water within the plan's bound, for which relays do not count;
one REDUCE, then one STEP, after the last task, also with no microbatch. And that nothing waits for ever, for one of two
ways of matching:

- "order", the default, holds for every backend. On each directed pair and direction, both sides list their transfers in
  the same order: the n-th SEND meets the n-th RECV, as on a channel without tags (NCCL). No circle of waiting even
  when every operation blocks until its peer has joined, each rank in the order of its list. A real channel blocks less:
  an operation holds up what comes after it on its own channel, not the rank.
- "tags" (gloo): sends never block, a RECV finds its message by tag whatever was sent before.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from skippipe.errors import ProgramError
from skippipe.runtime.program.program import INPUT_OF, OPCODE_OF_OPERATION, TASKS, Instruction, Opcode, Program
from skippipe_scheduler.plan.plan import Plan

Matching = Literal["order", "tags"]
TRANSFERS = (Opcode.SEND, Opcode.RECV)
EARLIER: Mapping[Opcode, Opcode] = {
    Opcode.BACKWARD: Opcode.FORWARD,
    Opcode.WEIGHT: Opcode.BACKWARD,
    Opcode.RELAY_BACKWARD: Opcode.RELAY_FORWARD,
}
"""The task of the same microbatch that stands before another one here."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What the proof found: most microbatches held by each rank, number of transfers and their bytes."""

    peak_memory: tuple[int, ...]
    num_transfers: int
    total_bytes: int


def prove(programs: Sequence[Program], plan: Plan, matching: Matching = "order") -> Proof:
    """Prove training programs against their plan; raise `ProgramError` naming ranks and what each waits for."""
    proof = prove_transfers(programs, matching)
    if [program.node for program in programs] != list(plan.nodes):
        raise ProgramError(f"programs are for {len(programs)} nodes, the plan has {len(plan.nodes)}, in rank order")
    for program, peak in zip(programs, proof.peak_memory, strict=True):
        _prove_tasks(program, plan)
        _prove_ending(program)
        limit = plan.costs.memory[program.node]
        if peak > limit:
            raise ProgramError(
                f"{_name(program)} holds {peak} microbatches between forward and backward; memory allows {limit}"
            )
    return proof


def prove_transfers(programs: Sequence[Program], matching: Matching = "order") -> Proof:
    """Prove all that holds for any set of programs, with or without backwards."""
    _prove_matching(programs)
    if matching == "order":
        _prove_pair_order(programs)
    for program in programs:
        _prove_dataflow(program)
    if matching == "order":
        _prove_no_circle(programs)
    else:
        _prove_no_circle_with_tags(programs)
    sends = [send for program in programs for send in program.select(Opcode.SEND)]
    return Proof(
        peak_memory=tuple(_peak_memory(program) for program in programs),
        num_transfers=len(sends),
        total_bytes=sum(send.size_bytes for send in sends),
    )


def _name(program: Program) -> str:
    return f"rank {program.rank} ({program.node})"


def _prove_matching(programs: Sequence[Program]) -> None:
    """Every transfer is listed once by its sender and once by its receiver, with equal content."""
    sides: dict[Opcode, dict[tuple[int, int, int], Instruction]] = {opcode: {} for opcode in TRANSFERS}
    for program in programs:
        for transfer in program.select(*TRANSFERS):
            if not 0 <= transfer.peer < len(programs) or transfer.peer == program.rank:
                raise ProgramError(f"{_name(program)}: {transfer}: no such peer among {len(programs)} ranks")
            pair = _source_and_destination(program.rank, transfer)
            if not 0 <= transfer.tag < 2**30:
                raise ProgramError(f"{_name(program)}: {transfer}: tag {transfer.tag} is not in 0 .. 2^30 - 1")
            if (*pair, transfer.tag) in sides[transfer.opcode]:
                raise ProgramError(f"{_name(program)}: {transfer}: tag {transfer.tag} is used twice on this pair")
            sides[transfer.opcode][*pair, transfer.tag] = transfer
    sends, receives = sides[Opcode.SEND], sides[Opcode.RECV]
    for key in sends.keys() ^ receives.keys():
        transfer = sends.get(key) or receives[key]
        rank, other = (key[0], "RECV") if key in sends else (key[1], "SEND")
        missing = f"rank {transfer.peer} has no {other} with tag {transfer.tag}"
        raise ProgramError(f"{_name(programs[rank])} waits in {transfer}: {missing}")
    for key, send in sends.items():
        receive = receives[key]
        if send.size_bytes != receive.size_bytes:
            raise ProgramError(
                f"{send} has {send.size_bytes} bytes at rank {key[0]} but {receive.size_bytes} at rank {key[1]}"
            )
        if _content(send) != _content(receive):
            raise ProgramError(f"rank {key[0]} has {send} where rank {key[1]} has {receive}, under the same tag")


def _source_and_destination(rank: int, transfer: Instruction) -> tuple[int, int]:
    """Return between which ranks a transfer that `rank` lists goes."""
    return (rank, transfer.peer) if transfer.opcode is Opcode.SEND else (transfer.peer, rank)


def _content(transfer: Instruction) -> tuple[int, int, str]:
    return transfer.microbatch, transfer.hop, transfer.direction


def _prove_pair_order(programs: Sequence[Program]) -> None:
    """On each directed pair and direction, sends and receives stand in the same order."""
    tags: dict[Opcode, dict[tuple[int, int, str], list[int]]] = {opcode: defaultdict(list) for opcode in TRANSFERS}
    for program in programs:
        for transfer in program.select(*TRANSFERS):
            source, destination = _source_and_destination(program.rank, transfer)
            tags[transfer.opcode][source, destination, transfer.direction].append(transfer.tag)
    for (source, destination, direction), sent in tags[Opcode.SEND].items():
        received = tags[Opcode.RECV][source, destination, direction]
        if sent != received:
            index = next(i for i, pair in enumerate(zip(sent, received, strict=True)) if pair[0] != pair[1])
            raise ProgramError(
                f"the {direction} transfers from rank {source} to rank {destination} differ in order: at number "
                f"{index} rank {source} sends tag {sent[index]}, rank {destination} waits for tag {received[index]}"
            )


def _prove_dataflow(program: Program) -> None:
    """Each task has its input, each SEND its output, before it in the list."""
    received: set[tuple[int, str]] = set()
    made: set[int] = set()
    done: set[tuple[Opcode, int]] = set()
    for instruction in program.instructions:
        opcode, microbatch = instruction.opcode, instruction.microbatch
        begins = opcode is Opcode.FORWARD and instruction.hop == 0
        earlier = Opcode.LOAD if begins else EARLIER.get(opcode)
        direction = None if begins else INPUT_OF.get(opcode)
        missing = None
        if earlier is not None and (earlier, microbatch) not in done:
            missing = f"its {earlier}"
        elif direction is not None and (microbatch, direction) not in received:
            missing = f"its RECV ({direction})"
        elif opcode is Opcode.SEND and microbatch not in made:
            missing = "an output to send"
        if missing is not None:
            raise ProgramError(f"{_name(program)}: {instruction} comes before {missing}")
        if opcode is Opcode.RECV:
            received.add((microbatch, instruction.direction))
        done.add((opcode, microbatch))
        if opcode in TASKS and opcode is not Opcode.WEIGHT:
            made.add(microbatch)
        elif opcode is Opcode.SEND:
            made.discard(microbatch)


def _prove_no_circle(programs: Sequence[Program]) -> None:
    """Run the lists with sends that block until their RECV is reached.

    A rendezvous needs exactly the two ranks that stand at it, and no rank ever chooses, so the outcome does not
    depend on the order in which they advance: one run decides.
    """
    queues = [program.select(*TRANSFERS) for program in programs]
    position = [0] * len(programs)
    pending = list(range(len(programs)))
    while pending:
        rank = pending.pop()
        if position[rank] == len(queues[rank]):
            continue
        mine = queues[rank][position[rank]]
        peer = mine.peer
        if position[peer] == len(queues[peer]):
            continue
        other = queues[peer][position[peer]]
        if other.peer == rank and other.tag == mine.tag and other.opcode is not mine.opcode:
            position[rank] += 1
            position[peer] += 1
            pending += [rank, peer]
    _refuse_stuck(programs, queues, position)


def _prove_no_circle_with_tags(programs: Sequence[Program]) -> None:
    """Run the lists with sends that never block; a RECV waits until its SEND was reached. One run decides here too."""
    queues = [program.select(*TRANSFERS) for program in programs]
    position = [0] * len(programs)
    sent: set[tuple[int, int, int]] = set()
    pending = list(range(len(programs)))
    while pending:
        rank = pending.pop()
        while position[rank] < len(queues[rank]):
            transfer = queues[rank][position[rank]]
            if transfer.opcode is Opcode.SEND:
                sent.add((rank, transfer.peer, transfer.tag))
                pending.append(transfer.peer)
            elif (transfer.peer, rank, transfer.tag) not in sent:
                break
            position[rank] += 1
    _refuse_stuck(programs, queues, position)


def _refuse_stuck(
    programs: Sequence[Program], queues: Sequence[Sequence[Instruction]], position: Sequence[int]
) -> None:
    """Raise where ranks have not reached the end of their lists, naming a circle of those that wait."""
    waiting = [rank for rank, queue in enumerate(queues) if position[rank] < len(queue)]
    if waiting:
        circle = _circle(
            waiting[0], [queue[position[rank]].peer if rank in waiting else -1 for rank, queue in enumerate(queues)]
        )
        stuck = "; ".join(f"{_name(programs[rank])} waits in {queues[rank][position[rank]]}" for rank in circle)
        raise ProgramError(f"ranks wait for each other: {stuck}")


def _circle(start: int, waits_for: Sequence[int]) -> list[int]:
    """Follow who waits for whom from `start` until a rank comes again; return the circle."""
    seen: list[int] = []
    rank = start
    while rank not in seen and rank >= 0:
        seen.append(rank)
        rank = waits_for[rank]
    return seen[seen.index(rank) :] if rank in seen else seen


def _peak_memory(program: Program) -> int:
    held = peak = 0
    if not program.select(Opcode.BACKWARD):
        return 0
    split = {weight.microbatch for weight in program.select(Opcode.WEIGHT)}
    for instruction in program.instructions:
        ends = Opcode.WEIGHT if instruction.microbatch in split else Opcode.BACKWARD
        held += (instruction.opcode is Opcode.FORWARD) - (instruction.opcode is ends)
        peak = max(peak, held)
    return peak


def _prove_tasks(program: Program, plan: Plan) -> None:
    """The program runs the plan's tasks of its node, each once, in the plan's order, at the right hop."""
    planned = [(OPCODE_OF_OPERATION[task.operation], task.microbatch) for task in plan.order.get(program.node, ())]
    listed = [(task.opcode, task.microbatch) for task in program.select(*TASKS)]
    if planned != listed:
        odd = next(iter((Counter(planned) - Counter(listed)) + (Counter(listed) - Counter(planned))), None)
        what = f"look at {odd[0]} of microbatch {odd[1]}" if odd else "the order differs"
        raise ProgramError(f"{_name(program)} does not run the plan's tasks: {what}")
    for task in program.select(*TASKS):
        path = plan.microbatches[task.microbatch].whole_path
        if path[task.hop : task.hop + 1] != (program.node,):
            raise ProgramError(f"{_name(program)}: {task}: this node is not at this place on the path {path}")


def _prove_ending(program: Program) -> None:
    for opcode in (Opcode.REDUCE, Opcode.STEP):
        count = len(program.select(opcode))
        if count != 1:
            raise ProgramError(f"{_name(program)} has {count} {opcode} instructions, expected 1")
    if [instruction.opcode for instruction in program.instructions[-2:]] != [Opcode.REDUCE, Opcode.STEP]:
        raise ProgramError(f"{_name(program)} must end with REDUCE, then STEP, after its last task")
