"""Programs: what every rank does in one iteration, as a list of instructions compiled from a plan.

All ranks are compiled at once from one global order of tasks and transfers (by planned time). Every rank issues its
part of that order, so even with blocking sends no ranks can wait for each other in a circle. The idea of explicit
instruction lists is DeepSpeed's (pipe/schedule.py) and torch.distributed.pipelining's; here each transfer names its
peer and hop, so that routes and the nodes that relay may differ by microbatch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import networkx

from skippipe_scheduler.plan.plan import Operation, Plan, Task
from skippipe_scheduler.plan.simulate import Direction, TaskSpan, Timeline, TransferSpan, simulate, simulate_order


class Opcode(StrEnum):
    """What an instruction does."""

    LOAD = "LOAD"
    FORWARD = "FORWARD"
    LOSS = "LOSS"
    BACKWARD = "BACKWARD"
    WEIGHT = "WEIGHT"
    RELAY_FORWARD = "RELAY_FORWARD"
    RELAY_BACKWARD = "RELAY_BACKWARD"
    SEND = "SEND"
    RECV = "RECV"
    REDUCE = "REDUCE"
    STEP = "STEP"


OPCODE_OF_OPERATION: Mapping[Operation, Opcode] = {
    "F": Opcode.FORWARD,
    "L": Opcode.LOSS,
    "B": Opcode.BACKWARD,
    "W": Opcode.WEIGHT,
    "RF": Opcode.RELAY_FORWARD,
    "RB": Opcode.RELAY_BACKWARD,
}
OPERATION_OF_OPCODE: Mapping[Opcode, Operation] = {opcode: name for name, opcode in OPCODE_OF_OPERATION.items()}
TASKS = tuple(OPERATION_OF_OPCODE)
"""The instructions that are tasks of the plan's order."""
RELAYS = (Opcode.RELAY_FORWARD, Opcode.RELAY_BACKWARD)
"""Those that compute nothing: what they have received is their output."""
INPUT_OF: Mapping[Opcode, Direction] = {
    Opcode.FORWARD: "forward",
    Opcode.RELAY_FORWARD: "forward",
    Opcode.LOSS: "forward",
    Opcode.BACKWARD: "backward",
    Opcode.RELAY_BACKWARD: "backward",
}
"""The direction of what a task has received; it is nothing for the forward at the origin."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """One step of a rank. A BACKWARD whose microbatch has a WEIGHT of its own leaves the weight gradients to that.

    A transfer towards the loss (also the return to the origin) is forward, else backward.

    Hops count on the microbatch's path, relays included. That of a task is the position of its node; a transfer of hop
    k joins positions k and k + 1, that of the last hop the last node and the origin.
    `tag` is the same on both sides and unique in an iteration.
    """

    opcode: Opcode
    microbatch: int = -1
    hop: int = -1
    direction: Direction = "forward"
    peer: int = -1
    size_bytes: int = 0
    tag: int = -1

    def __str__(self) -> str:
        """Describe the instruction for a message, such as `SEND of microbatch 3 hop 1 forward to rank 2`."""
        if self.microbatch < 0:
            return self.opcode.value
        text = f"{self.opcode} of microbatch {self.microbatch} hop {self.hop}"
        if self.opcode in (Opcode.SEND, Opcode.RECV):
            text += f" {self.direction} {'to' if self.opcode is Opcode.SEND else 'from'} rank {self.peer}"
        return text


@dataclass(frozen=True, slots=True)
class Program:
    """The instructions of one rank."""

    rank: int
    node: str
    stage: int
    instructions: tuple[Instruction, ...]

    def select(self, *opcodes: Opcode) -> tuple[Instruction, ...]:
        """Return the instructions with one of these opcodes, in order."""
        return tuple(instruction for instruction in self.instructions if instruction.opcode in opcodes)


def compile_programs(plan: Plan, activation_bytes: int) -> tuple[Program, ...]:
    """Return the training program of every rank; transfers carry `activation_bytes`.

    Raises `DeadlockError` where the plan's order makes nodes wait for each other.
    """
    paths = [microbatch.whole_path for microbatch in plan.microbatches]
    ending = (Instruction(Opcode.REDUCE), Instruction(Opcode.STEP))
    return _compile(plan, paths, plan.order, simulate(plan), activation_bytes, ending)


def compile_evaluation(plan: Plan, activation_bytes: int, num_microbatches: int) -> tuple[Program, ...]:
    """Return programs of forwards and losses at full depth: stages 0 .. S-1 in order, replicas round-robin.

    Stages that nobody holds are left out.
    """
    held = [stage.nodes for stage in plan.stages if stage.nodes]
    num_stages = len(held)
    routes = [tuple(nodes[microbatch % len(nodes)] for nodes in held) for microbatch in range(num_microbatches)]
    order: dict[str, list[Task]] = {node: [] for node in plan.nodes}
    for wave in range(num_microbatches + num_stages):
        if wave >= num_stages:
            loss = wave - num_stages
            order[routes[loss][0]].append(Task("L", loss))
        for microbatch in range(max(0, wave - num_stages + 1), min(wave + 1, num_microbatches)):
            order[routes[microbatch][wave - microbatch]].append(Task("F", microbatch))
    timeline = simulate_order(routes, order, plan.costs)
    return _compile(plan, routes, order, timeline, activation_bytes, ())


def _compile(
    plan: Plan,
    paths: Sequence[tuple[str, ...]],
    order: Mapping[str, Sequence[Task]],
    timeline: Timeline,
    activation_bytes: int,
    ending: tuple[Instruction, ...],
) -> tuple[Program, ...]:
    lists: dict[str, list[Instruction]] = {node: [] for node in plan.nodes}
    num_hops = max((len(path) for path in paths), default=1)
    for event in _global_order(order, timeline):
        if isinstance(event, TaskSpan):
            if event.operation == "F" and event.hop == 0:
                lists[event.node].append(Instruction(Opcode.LOAD, event.microbatch, 0))
            opcode = OPCODE_OF_OPERATION[event.operation]
            lists[event.node].append(Instruction(opcode, event.microbatch, event.hop))
        else:
            source, destination = plan.rank_of[event.source], plan.rank_of[event.destination]
            tag = 2 * (event.microbatch * num_hops + event.hop) + (event.direction == "backward")
            for opcode, node, peer in (
                (Opcode.SEND, event.source, destination),
                (Opcode.RECV, event.destination, source),
            ):
                lists[node].append(
                    Instruction(opcode, event.microbatch, event.hop, event.direction, peer, activation_bytes, tag)
                )
    return tuple(
        Program(rank, node, plan.stage_of[node], (*lists[node], *ending)) for rank, node in enumerate(plan.nodes)
    )


def _global_order(order: Mapping[str, Sequence[Task]], timeline: Timeline) -> list[TaskSpan | TransferSpan]:
    """Return all tasks and transfers in one order that respects every dependency and, within that, planned time."""
    span_of = {(span.node, span.operation, span.microbatch): span for span in timeline.tasks}
    graph: networkx.DiGraph[TaskSpan | TransferSpan] = networkx.DiGraph()
    graph.add_nodes_from(timeline.tasks)
    for node, tasks in order.items():
        networkx.add_path(graph, [span_of[node, task.operation, task.microbatch] for task in tasks])
    for transfer in timeline.transfers:
        successor = span_of.get((transfer.destination, transfer.user, transfer.microbatch))
        if successor is not None:  # an evaluation has no backward
            graph.add_edge(span_of[transfer.source, transfer.maker, transfer.microbatch], transfer)
            graph.add_edge(transfer, successor)
    return list(networkx.lexicographical_topological_sort(graph, key=_planned_time))


def _planned_time(event: TaskSpan | TransferSpan) -> tuple[float, int, int]:
    """Sort a transfer at the end of the task that made it, before any task that starts then."""
    if isinstance(event, TaskSpan):
        return event.start_s, 1, event.microbatch
    return event.ready_s, 0, event.microbatch
