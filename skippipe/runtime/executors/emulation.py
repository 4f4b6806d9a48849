"""Make one machine behave like the cluster of the plan: slow tasks, slow links.

Every rank keeps an ideal clock: a task starts when the task before it has ended and its input has arrived, on the
ideal clocks of both ranks, and takes the plan's time. Ranks sleep until the ideal time, and wake a little late; as
the ideal clock does not, lateness does not add up over a chain of tasks. Where the machine cannot keep up (a task
really took longer than planned) the ideal clock is moved to the real one: emulated time never runs ahead of what
was really computed. A relay computes nothing and takes no time, so it never moves the clock. Clocks are comparable
because Linux's monotonic clock is one for all processes of a machine.

With jitter each task and each transfer takes its planned time by a lognormal factor that depends on the seed, the
iteration and what it is, not on when it happens, so that two executors meet the same weather.

Contention "node" is emulated for the sender's card only: a receiver's card is shared by senders that do not know of
each other. For the same reason links of contention "shared" are not emulated at all.
"""

import math
import random
import time
from collections.abc import Mapping
from typing import assert_never

from skippipe.config.experiment import EmulationOptions
from skippipe.errors import ConfigError
from skippipe.runtime.program.program import OPERATION_OF_OPCODE, RELAYS, Instruction
from skippipe_scheduler.plan.plan import Plan


class Emulation:
    """The ideal clock of one rank, in nanoseconds of the monotonic clock."""

    def __init__(
        self,
        plan: Plan,
        node: str,
        options: EmulationOptions,
        pace: float = 1.0,
        link_pace: Mapping[str, float] | None = None,
    ) -> None:
        """Begin with the plan's times; those of the node's tasks are `pace` times those of the cluster to emulate.

        And those of its messages `link_pace[destination]` times.
        """
        if options.links and plan.costs.contention == "shared":
            raise ConfigError(
                "emulation.links: the plan has contention shared, where the speed of a message depends on messages of "
                "other processes; plan with contention link or node, or shape real links (docs/emulation.md)"
            )
        self._costs = plan.costs
        self._node = node
        self._nodes = plan.nodes
        self._options = options
        reduce_s = plan.costs.reduce_s or (0.0,) * len(plan.stages)
        self._reduce_s = reduce_s[plan.stage_of[node]]
        self._task_s: Mapping[str, float] = {
            "F": plan.costs.forward_s[node] / pace,
            "L": plan.costs.loss_s[node] / pace,
            "B": plan.costs.backward_s[node] / pace,
            "W": (plan.costs.weight_s or {}).get(node, 0.0) / pace,
            "RF": 0.0,
            "RB": 0.0,
        }
        self._known_link_pace = link_pace or {}
        self._changes = sorted(
            (each.step, each.factor) for each in options.paces if each.to is None and each.node == node
        )
        self._link_changes = sorted(
            (each.step, each.factor, other)
            for each in options.paces
            for end, other in ((each.node, each.to), (each.to, each.node))
            if end == node and other is not None
        )
        self._split = plan.split_of[node]
        self.start_iteration(0)

    def start_iteration(self, zero_ns: int, iteration: int = 0) -> None:
        """Set the clock to the iteration's beginning, the same on all ranks."""
        self._iteration = iteration
        begun = [factor for step, factor in self._changes if step <= iteration]
        self._pace = begun[-1] if begun else 1.0
        self._link_pace = {other: factor for step, factor, other in self._link_changes if step <= iteration}
        self.end_ns = zero_ns
        """Ideal end of the last task."""
        self._free_ns = zero_ns
        self._start_ns = zero_ns
        self._link_free_ns: dict[str, int] = {}

    def begin(self, arrival_ns: int) -> int:
        """Sleep until a task whose input arrives at `arrival_ns` may start; return that time.

        Called when the message is here: on real links it came later than it was sent, at an unknown time until now.
        """
        if not self._options.links and arrival_ns:
            arrival_ns = time.monotonic_ns()
        self._start_ns = max(self._free_ns, arrival_ns)
        sleep_until(self._start_ns)
        if not self._options.compute:
            self._start_ns = time.monotonic_ns()
        return self._start_ns

    def wait_until_free(self) -> int:
        """Sleep until the task before has ended, and return that time: what to do next is decided then."""
        sleep_until(self._free_ns)
        return self._free_ns

    def finish(self, task: Instruction) -> int:
        """Return when the task that has just been computed ends; the next `begin` sleeps until then.

        On real links this one does: what the task made must not leave before.
        """
        self.end_ns = time.monotonic_ns()
        if self._options.compute:
            operation = OPERATION_OF_OPCODE[task.opcode]
            task_s = self._task_s[operation]
            if operation == "B" and task.microbatch in self._split:
                task_s -= self._task_s["W"]
            task_s *= self._pace * self._jitter(self._node, operation, task.microbatch)
            computed_ns = self._start_ns if task.opcode in RELAYS else self.end_ns
            self.end_ns = max(computed_ns, self._start_ns + _ns(task_s))
            if not self._options.links:
                sleep_until(self.end_ns)
        overhead_s = self._costs.task_overhead_s if self._options.compute else 0.0
        self._free_ns = self.end_ns + _ns(overhead_s)
        return self.end_ns

    def deliver_ns(self, send: Instruction) -> int:
        """Return when a message that leaves at the end of the last task arrives; messages queue on their link."""
        if not self._options.links:
            return self.end_ns
        destination = self._nodes[send.peer]
        factor = self._jitter(self._node, destination, send.microbatch, send.hop, send.direction)
        factor *= self._link_pace.get(destination, 1.0) / self._known_link_pace.get(destination, 1.0)
        start_ns = self.end_ns
        queue = self._queue_to(destination)
        if queue is not None:
            start_ns = max(start_ns, self._link_free_ns.get(queue, 0))
            self._link_free_ns[queue] = start_ns + _ns(self._costs.occupancy_s(self._node, destination) * factor)
        return start_ns + _ns(self._costs.transfer_s[self._node][destination] * factor)

    def _queue_to(self, destination: str) -> str | None:
        """Return what a message queues for on this node: its link, or the card of all links (""); None for nothing."""
        match self._costs.contention:
            case "none":
                return None
            case "link" | "shared":  # with the latter no links are emulated
                return destination
            case "node":
                return ""
            case _:
                assert_never(self._costs.contention)

    def _jitter(self, *what: object) -> float:
        """Return the factor by which something takes longer or shorter in this iteration."""
        if self._options.jitter_sigma == 0:
            return 1.0
        drawn = random.Random(repr((self._options.seed, self._iteration, *what)))
        return math.exp(drawn.gauss(0.0, self._options.jitter_sigma))

    def finish_reduction(self, entered_ns: int) -> int:
        """Sleep until a reduction that all replicas had entered at `entered_ns` ends; return that time."""
        reduce_s = self._reduce_s if self._options.links else 0.0
        self.end_ns = max(time.monotonic_ns(), entered_ns + _ns(reduce_s))
        sleep_until(self.end_ns)
        return self.end_ns


def sleep_until(time_ns: int) -> None:
    """Sleep until the monotonic clock shows `time_ns`; return at once where it is past."""
    remaining_ns = time_ns - time.monotonic_ns()
    if remaining_ns > 0:
        time.sleep(remaining_ns * 1e-9)


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
