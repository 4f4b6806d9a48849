"""Which task a rank may run next where the plan's order is a preference, not a command. No torch here.

A rank may run any task whose input is there, but out of the plan's order only while the rest of the plan's order
still fits in memory behind it: with the tasks that are left, run one after the other as planned, never more than
`memory` microbatches are held between their forward and their last task here. So a backward or a relay may always come
early (it holds nothing more), and a forward exactly where no point of the order before its own place would hold too
many with one more.

Memory is never exceeded: every task that runs has passed this test, which counts it.

Nothing waits for ever. Take all tasks of all ranks that are left, in one order that respects the planned order of
every rank and the chain of every microbatch (the plan was proved to have one). The input of the first of them is made
by a task that is done, so it is here or on its way: no send waits for more than its receiver's listening thread. That
task also stands first in what is left of its own rank's order, and the rest of an order always fits behind its own
first task, because the test held when the task before it ran. So its rank may run it. No rank needs to know what the
others hold.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from skippipe.runtime.program.program import TASKS, Instruction, Opcode, Program


@dataclass(frozen=True)
class TaskDependencies:
    """What stands around each task of a program."""

    receive_of: Mapping[Instruction, Instruction]
    """The RECV that brings a task's input."""
    task_of: Mapping[Instruction, Instruction]
    """The task whose input a RECV brings."""
    send_of: Mapping[Instruction, Instruction]
    """The SEND of a task's output."""
    next_local_task: Mapping[Instruction, Instruction]
    """For a task: the next one of its microbatch here, where that waits for this task alone and for no message."""
    loads: frozenset[Instruction]
    """Tasks with a LOAD before them."""
    first: frozenset[Instruction]
    """Tasks that need no input."""
    change_of: Mapping[Instruction, int]
    """How many microbatches more are held after a task: one from a microbatch's forward to its last task here."""

    @classmethod
    def of(cls, program: Program) -> "TaskDependencies":
        """Read them from a program's list; one microbatch's instructions stand in the order of its chain."""
        waiting: dict[int, Instruction] = {}
        latest: dict[int, Instruction] = {}
        maker: dict[int, Instruction] = {}
        loaded: set[int] = set()
        receive_of, send_of, next_local_task = {}, {}, {}
        loads, first = set(), set()
        for instruction in program.instructions:
            if instruction.opcode is Opcode.LOAD:
                loaded.add(instruction.microbatch)
            elif instruction.opcode is Opcode.RECV:
                waiting[instruction.microbatch] = instruction
            elif instruction.opcode is Opcode.SEND:
                send_of[maker[instruction.microbatch]] = instruction
            elif instruction.opcode in TASKS:
                if instruction.microbatch in loaded:
                    loads.add(instruction)
                    loaded.remove(instruction.microbatch)
                if instruction.microbatch in waiting:
                    receive_of[instruction] = waiting.pop(instruction.microbatch)
                    maker[instruction.microbatch] = instruction
                elif instruction.microbatch in latest:  # nothing is sent for it, and it makes nothing to send
                    next_local_task[latest[instruction.microbatch]] = instruction
                else:
                    first.add(instruction)
                    maker[instruction.microbatch] = instruction
                latest[instruction.microbatch] = instruction
        task_of = {receive: task for task, receive in receive_of.items()}
        forwards = [task for task in (*receive_of, *first) if task.opcode is Opcode.FORWARD]
        change_of = Counter(forwards)
        change_of.subtract(latest[forward.microbatch] for forward in forwards)
        return cls(receive_of, task_of, send_of, next_local_task, frozenset(loads), frozenset(first), change_of)


class ReadyTasks:
    """The tasks of one rank that are left, in planned order, and which of them have their input."""

    def __init__(self, program: Program, dependencies: TaskDependencies, memory: int) -> None:
        self._memory = memory
        self._held = 0
        self._left = [task for task in program.instructions if task.opcode in TASKS]
        self._dependencies = dependencies
        self._ready = set(dependencies.first)

    def __len__(self) -> int:
        """Return how many tasks are left."""
        return len(self._left)

    @property
    def head(self) -> Instruction:
        """The task that comes first in planned order."""
        return self._left[0]

    def is_ready(self, task: Instruction) -> bool:
        """Return whether a task has its input."""
        return task in self._ready

    def arrive(self, task: Instruction) -> None:
        """Note that the input of a task is there."""
        self._ready.add(task)

    def finish(self, task: Instruction) -> None:
        """Note that a task is done; one that waited for just that becomes ready."""
        if task in self._dependencies.next_local_task:
            self._ready.add(self._dependencies.next_local_task[task])

    def take(self) -> Instruction | None:
        """Remove and return the first task in planned order that is ready and may run now; None where none may."""
        held = peak = self._held
        for index, task in enumerate(self._left):
            change = self._dependencies.change_of.get(task, 0)
            if task in self._ready and (change <= 0 or peak + change <= self._memory):
                del self._left[index]
                self._ready.remove(task)
                self._held += change
                return task
            held += change
            peak = max(peak, held)
        return None
