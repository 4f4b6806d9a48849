"""In any weather, ranks that take what is ready finish the plan and never hold more than it allows."""

import heapq
import random
from collections.abc import Iterator

from hypothesis import given, settings, strategies as st
from random_plans import random_plan

from skippipe.runtime.program.program import TASKS, Instruction, Opcode, Program, compile_programs
from skippipe.runtime.program.readiness import ReadyTasks, TaskDependencies
from skippipe_scheduler.plan.plan import Plan


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    num_stages = draw(st.integers(2, 5))
    return random_plan(
        draw(st.integers(0, 10_000)),
        num_nodes=draw(st.integers(num_stages, 8)),
        num_stages=num_stages,
        route_length=draw(st.integers(2, num_stages)),
        num_microbatches=draw(st.integers(1, 12)),
        memory=draw(st.integers(1, 4)),
        split=draw(st.sampled_from([0.0, 0.5])),
        relays=draw(st.sampled_from([0.0, 0.5])),
    )


class Weather:
    """Runs all ranks of a plan at once; tasks and messages take random times that have nothing to do with the plan."""

    def __init__(self, plan: Plan, seed: int) -> None:
        self.plan = plan
        self.generator = random.Random(seed)
        self.programs: tuple[Program, ...] = compile_programs(plan, 8)
        self.dependencies = [TaskDependencies.of(program) for program in self.programs]
        self.tasks = [
            ReadyTasks(program, dependencies, plan.costs.memory[program.node])
            for program, dependencies in zip(self.programs, self.dependencies, strict=True)
        ]
        self.ran: list[list[Instruction]] = [[] for _ in self.programs]
        self.held = [0] * len(self.programs)
        self.split = [
            {instruction.microbatch for instruction in program.select(Opcode.WEIGHT)} for program in self.programs
        ]

    def run(self) -> None:
        events: list[tuple[float, int, int, Instruction | None]] = [
            (0.0, number, rank, None) for number, rank in enumerate(range(len(self.programs)))
        ]
        idle = set(range(len(self.programs)))
        number = len(events)
        while events:
            now_s, _, rank, arrival = heapq.heappop(events)
            if arrival is not None:
                self.tasks[rank].arrive(arrival)
            elif rank not in idle:  # a task has ended
                idle.add(rank)
                done = self.ran[rank][-1]
                self.tasks[rank].finish(done)
                for peer, task in self.received_by(rank, done):
                    number += 1
                    heapq.heappush(events, (now_s + self.generator.expovariate(1), number, peer, task))
            taken = self.tasks[rank].take() if rank in idle else None
            if taken is not None:
                idle.remove(rank)
                self.ran[rank].append(taken)
                ends = Opcode.WEIGHT if taken.microbatch in self.split[rank] else Opcode.BACKWARD
                self.held[rank] += (taken.opcode is Opcode.FORWARD) - (taken.opcode is ends)
                assert self.held[rank] <= self.plan.costs.memory[self.programs[rank].node]
                number += 1
                heapq.heappush(events, (now_s + self.generator.expovariate(1), number, rank, None))

    def received_by(self, rank: int, done: Instruction) -> Iterator[tuple[int, Instruction]]:
        send = self.dependencies[rank].send_of.get(done)
        if send is not None:
            peer = self.dependencies[send.peer]
            yield send.peer, next(task for receive, task in peer.task_of.items() if receive.tag == send.tag)


@given(plans(), st.integers(0, 100))
@settings(max_examples=150)
def test_every_plan_ends_within_memory_in_any_weather(plan: Plan, seed: int) -> None:
    weather = Weather(plan, seed)
    weather.run()
    for program, ran in zip(weather.programs, weather.ran, strict=True):
        planned = program.select(*TASKS)
        assert sorted(map(str, ran)) == sorted(map(str, planned))


def two_microbatches(memory: int) -> tuple[Program, TaskDependencies, ReadyTasks]:
    """A rank that is planned to run the forward and the backward of microbatch 0, then those of 1."""
    instructions = []
    for microbatch in range(2):
        for opcode, direction in ((Opcode.FORWARD, "forward"), (Opcode.BACKWARD, "backward")):
            tag = 2 * microbatch + (direction == "backward")
            instructions.append(Instruction(Opcode.RECV, microbatch, 0, direction, 1, 8, tag))  # type: ignore[arg-type]
            instructions.append(Instruction(opcode, microbatch, 1))
    program = Program(0, "node-0", 1, (*instructions, Instruction(Opcode.REDUCE), Instruction(Opcode.STEP)))
    dependencies = TaskDependencies.of(program)
    return program, dependencies, ReadyTasks(program, dependencies, memory)


def test_forward_comes_early_only_where_memory_has_room() -> None:
    early = Instruction(Opcode.FORWARD, 1, 1)
    for memory, taken in ((1, None), (2, early)):
        _, dependencies, tasks = two_microbatches(memory)
        assert tasks.take() is None
        assert early in dependencies.receive_of
        tasks.arrive(early)
        assert tasks.take() == taken
        tasks.arrive(Instruction(Opcode.FORWARD, 0, 1))
        assert tasks.take() == Instruction(Opcode.FORWARD, 0, 1), "the plan's next task always fits"


def test_backward_comes_early_and_makes_room() -> None:
    _, _, tasks = two_microbatches(2)
    for microbatch in (0, 1):
        tasks.arrive(Instruction(Opcode.FORWARD, microbatch, 1))
        tasks.take()
    tasks.arrive(Instruction(Opcode.BACKWARD, 1, 1))
    assert tasks.head == Instruction(Opcode.BACKWARD, 0, 1)
    assert not tasks.is_ready(tasks.head)
    assert tasks.take() == Instruction(Opcode.BACKWARD, 1, 1)


def test_relays_wait_for_their_messages_alone() -> None:
    forward = Instruction(Opcode.FORWARD, 0, 1)
    relays = [Instruction(opcode, 1, 1) for opcode in (Opcode.RELAY_FORWARD, Opcode.RELAY_BACKWARD)]
    backward = Instruction(Opcode.BACKWARD, 0, 1)
    order = [(forward, "forward"), (relays[0], "forward"), (relays[1], "backward"), (backward, "backward")]
    instructions = [
        instruction
        for tag, (task, direction) in enumerate(order)
        for instruction in (Instruction(Opcode.RECV, task.microbatch, 0, direction, 1, 8, tag), task)  # type: ignore[arg-type]
    ]
    program = Program(0, "node-0", 1, (*instructions, Instruction(Opcode.REDUCE), Instruction(Opcode.STEP)))
    dependencies = TaskDependencies.of(program)
    assert [dependencies.change_of.get(task, 0) for task, _ in order] == [1, 0, 0, -1]
    tasks = ReadyTasks(program, dependencies, memory=1)
    tasks.arrive(forward)
    assert tasks.take() == forward
    for relay in relays:  # while memory is full
        assert tasks.take() is None
        tasks.arrive(relay)
        assert tasks.take() == relay
        tasks.finish(relay)
    tasks.arrive(backward)
    assert tasks.take() == backward
