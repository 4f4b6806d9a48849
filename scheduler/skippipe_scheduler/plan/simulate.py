"""The exact simulator: when every task and transfer of a plan starts and ends.

A microbatch is a chain of tasks: forward along its route, loss at the origin, backward the same way in reverse.
Each task has exactly one predecessor in its chain and one in its node's order, so the times are unique. Where a
backward is split, its weight gradient follows it on the same node and nothing else waits for it. Nodes that relay are
links of the chain, too: their tasks take no time but the overhead.
"""

import heapq
import math
import random
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from skippipe_scheduler.errors import DeadlockError, PlanError, nearest
from skippipe_scheduler.plan.plan import Operation, Plan, Predicted, Task, split_backwards
from skippipe_scheduler.plan.shared_links import SharedLinks
from skippipe_scheduler.problem.costs import Costs
from skippipe_scheduler.problem.sharing.contention import Resource, occupied_resources

Direction = Literal["forward", "backward"]
OperationName = Literal["forward", "loss", "backward", "weight gradient", "forward relay", "backward relay"]
OPERATION_NAMES: Mapping[Operation, OperationName] = {
    "F": "forward",
    "L": "loss",
    "B": "backward",
    "W": "weight gradient",
    "RF": "forward relay",
    "RB": "backward relay",
}


class TaskSpan(NamedTuple):
    """One task of a node; `hop` is its position on the path, which is the route where nobody relays."""

    node: str
    operation: Operation
    microbatch: int
    hop: int
    start_s: float
    end_s: float


class TransferSpan(NamedTuple):
    """One transfer: ready when its task ended, start when its link was free, end when it arrived.

    From `free_s` on the link can carry the next one (equal to `start_s` where links are not shared).
    `hop` numbers the hops of the path from 0 in both directions; the last joins its last node and the origin.
    `maker` is the operation at the source whose output it is, `user` the one at the destination that waits for it.
    """

    source: str
    destination: str
    microbatch: int
    hop: int
    direction: Direction
    maker: Operation
    user: Operation
    ready_s: float
    start_s: float
    end_s: float
    free_s: float


class ReductionSpan(NamedTuple):
    """Gradient reduction over the replicas of one stage."""

    stage: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """What happens in one iteration, in seconds from its start, and what follows from it.

    Examples:
        >>> len(timeline.tasks)  # of 6 microbatches: 2 forwards, a loss and 2 backwards each
        30
        >>> timeline.tasks[0].operation, timeline.tasks[0].start_s
        ('F', 0.0)
        >>> timeline.iteration_s == timeline.pipeline_s + timeline.reduce_exposed_s
        True
        >>> 0 < timeline.bubble_fraction < 1
        True
    """

    tasks: tuple[TaskSpan, ...]
    """Every forward, loss, backward, weight gradient and relay."""
    transfers: tuple[TransferSpan, ...]
    """Every activation and gradient on its way from node to node."""
    reductions: tuple[ReductionSpan, ...]
    """The gradient reduction of each stage."""
    busy_s: dict[str, float]
    """Seconds for which each node computes."""
    peak_memory: dict[str, int]
    """The most microbatches that each node holds at once."""
    cut: tuple[TaskSpan, ...] = ()
    """The tasks that a lost node was in the middle of; they end at the loss and count as not done."""

    def predicted(self, bound_s: float) -> Predicted:
        """Return its times as a plan has them, with a lower bound of the iteration's; one above it counts as equal."""
        return Predicted(
            iteration_s=self.iteration_s,
            pipeline_s=self.pipeline_s,
            reduce_exposed_s=self.reduce_exposed_s,
            lower_bound_s=min(bound_s, self.iteration_s),
        )

    @cached_property
    def pipeline_s(self) -> float:
        """End of the last task."""
        return max((task.end_s for task in self.tasks), default=0.0)

    @cached_property
    def iteration_s(self) -> float:
        """End of the last task or reduction."""
        return max(self.pipeline_s, max((span.end_s for span in self.reductions), default=0.0))

    @property
    def reduce_exposed_s(self) -> float:
        """Reduction that the pipeline does not hide."""
        return self.iteration_s - self.pipeline_s

    @property
    def bubble_fraction(self) -> float:
        """Share of all nodes' time in which they compute nothing."""
        total_s = self.iteration_s * len(self.busy_s)
        return 1.0 - sum(self.busy_s.values()) / total_s if total_s else 0.0


def simulate(
    plan: Plan,
    *,
    slowdown: Mapping[str, float] | None = None,
    jitter_sigma: float = 0.0,
    seed: int = 0,
    lost_s: Mapping[str, float] | None = None,
) -> Timeline:
    """Simulate one iteration of a plan: when every task and transfer starts and ends.

    Args:
        plan: The plan.
        slowdown: Factor on the task times of single nodes, by name.
        jitter_sigma: Above 0, every task and transfer takes its time by a lognormal factor of this sigma (median 1).
        seed: Seed of the jitter.
        lost_s: When nodes are lost, in seconds from the start, by name. A lost node is gone with its task and all that
            is in flight to or from it; the timeline then ends where nobody can go on.

    Returns:
        The timeline; exact where neither jitter nor slowdown is given.

    Raises:
        DeadlockError: The order of the plan makes nodes wait for each other; the message names them.
        PlanError: A node is none of the plan's, or the sigma is negative.

    Examples:
        >>> timeline = simulate(plan)
        >>> timeline.iteration_s == plan.predicted.iteration_s
        True
        >>> simulate(plan, slowdown={"turin-0": 3.0}).busy_s["turin-0"] > timeline.busy_s["turin-0"]
        True
    """
    for what, named in (("slowdown", slowdown), ("lost_s", lost_s)):
        unknown = sorted(set(named or ()).difference(plan.nodes))
        if unknown:
            raise PlanError(f"{what}: the plan has no node {unknown[0]!r}; {nearest(unknown[0], plan.nodes)}")
    if jitter_sigma < 0:
        raise PlanError(f"jitter_sigma: {jitter_sigma:g}; give a number of at least 0")
    return simulate_order(
        [microbatch.whole_path for microbatch in plan.microbatches],
        plan.order,
        plan.costs,
        stages=[stage.nodes for stage in plan.stages],
        reduce_s=plan.costs.reduce_s or (),
        slowdown=slowdown,
        jitter_sigma=jitter_sigma,
        seed=seed,
        lost_s=lost_s,
    )


def simulate_order(
    paths: Sequence[tuple[str, ...]],
    order: Mapping[str, Sequence[Task]],
    costs: Costs,
    *,
    stages: Sequence[Sequence[str]] = (),
    reduce_s: Sequence[float] = (),
    slowdown: Mapping[str, float] | None = None,
    jitter_sigma: float = 0.0,
    seed: int = 0,
    lost_s: Mapping[str, float] | None = None,
) -> Timeline:
    """Return the timeline of `order`, where microbatch m takes `paths[m]` (origin first).

    `slowdown` multiplies a node's task times; `jitter_sigma` multiplies every task and transfer by a lognormal
    factor of that sigma (median 1). `stages` and `reduce_s` add the gradient reductions.
    A node in `lost_s` is gone from that second on, with its task and all that is in flight to or from it; the
    timeline then ends where nobody can go on, and a stage is reduced only if its replicas are all there and done.
    Raises `DeadlockError` where the order makes nodes wait for each other, naming them.
    """
    run = _SimulationRun(paths, order, costs, slowdown or {}, jitter_sigma, random.Random(seed), lost_s or {})
    run.execute()
    nodes = [node for stage in stages for node in stage] or list(order)
    last_end_s = dict.fromkeys(nodes, 0.0)
    busy_s = dict.fromkeys(nodes, 0.0)
    for task in (*run.tasks, *run.cut):
        last_end_s[task.node] = max(last_end_s[task.node], task.end_s)
        busy_s[task.node] += task.end_s - task.start_s
    reductions = []
    for stage, (replicas, duration_s) in enumerate(zip(stages, reduce_s, strict=False)):
        if not replicas or any(node in run.lost_s or not run.is_done(node) for node in replicas):
            continue
        start_s = max(last_end_s[node] for node in replicas)
        reductions.append(ReductionSpan(stage, start_s, start_s + duration_s))
    peak_memory = {
        node: peak_held(order.get(node, ())[: run.position.get(node, 0)], run.split.get(node)) for node in nodes
    }
    return Timeline(tuple(run.tasks), tuple(run.transfers), tuple(reductions), busy_s, peak_memory, tuple(run.cut))


def inputs(timeline: Timeline) -> dict[tuple[str, Operation, int], TransferSpan]:
    """Return the transfer that brings its input to each task (node, operation, microbatch) that has one."""
    return {(span.destination, span.user, span.microbatch): span for span in timeline.transfers}


def peak_held(tasks: Sequence[Task], split: Set[int] | None = None) -> int:
    """Return the most microbatches held between their forward and their backward when `tasks` run in order.

    A microbatch of `split` (default: those with a W among the tasks) is held until its weight gradient is done.
    """
    later = split_backwards(tasks) if split is None else split
    held = peak = 0
    for task in tasks:
        ends = ends_hold(task, later)
        held += (task.operation == "F") - ends
        peak = max(peak, held + ends)
    return peak


def ends_hold(task: Task | TaskSpan, split: Set[int]) -> bool:
    """Return whether the end of a node's task lets go of the microbatch, where the backwards of `split` are split."""
    return task.operation == ("W" if task.microbatch in split else "B")


_Event = tuple[float, int, int, str, str, Task, Operation, Direction]
"""A transfer that becomes ready, by time: seconds, microbatch, hop, source, destination, the task that uses it, and
the operation that made it."""


class _Offer(NamedTuple):
    """A transfer that shares the network, and the factor by which it takes longer."""

    event: _Event
    factor: float


class _SimulationRun:
    """One discrete-event simulation. Its events are the transfers that become ready, in order of time."""

    def __init__(
        self,
        paths: Sequence[tuple[str, ...]],
        order: Mapping[str, Sequence[Task]],
        costs: Costs,
        slowdown: Mapping[str, float],
        jitter_sigma: float,
        generator: random.Random,
        lost_s: Mapping[str, float],
    ) -> None:
        self.paths, self.order, self.costs, self.slowdown = paths, order, costs, slowdown
        self.jitter_sigma, self.generator, self.lost_s = jitter_sigma, generator, lost_s
        self.split = {node: split_backwards(tasks) for node, tasks in order.items()}
        self.relayed = {
            node: {task.microbatch for task in tasks if task.operation == "RF"} for node, tasks in order.items()
        }
        self.table_s: dict[Operation, Mapping[str, float]] = {
            "F": costs.forward_s,
            "L": costs.loss_s,
            "B": costs.backward_s,
            "W": costs.weight_s or {},
            "RF": dict.fromkeys(order, 0.0),
            "RB": dict.fromkeys(order, 0.0),
        }
        self.hop_of = [{node: hop for hop, node in enumerate(path)} for path in paths]
        self.tasks: list[TaskSpan] = []
        self.transfers: list[TransferSpan] = []
        self.cut: list[TaskSpan] = []
        self.position = dict.fromkeys(order, 0)
        """Tasks that each node has begun."""
        self.free_s = dict.fromkeys(order, 0.0)
        """When each node has ended its last task and its overhead."""
        self.resource_free_s: dict[Resource, float] = {}
        """When each link or network card that is shared has sent its last transfer."""
        self.arrived_s = {(path[0], Task("F", microbatch)): 0.0 for microbatch, path in enumerate(paths)}
        """When the input of each task of each node was there."""
        self.ready: list[_Event] = []
        self.sharing: SharedLinks[_Offer] | None = None
        if costs.contention == "shared":
            self.sharing = SharedLinks(costs.shared_capacities(), costs.gbit_per_s or {})
        self.gone = sorted((gone_s, node) for node, gone_s in self.lost_s.items())

    def execute(self) -> None:
        """Run until no transfer is on its way; raise `DeadlockError` where tasks are left and no node was lost."""
        for node in self.order:
            self._advance(node)
        while self.ready or (self.sharing and self.sharing.next_end_s < math.inf):
            if self.sharing:
                self._share(self.sharing)
            else:
                self._deliver(heapq.heappop(self.ready))
        if not self.lost_s and not all(self.is_done(node) for node in self.order):
            raise DeadlockError(self._who_waits())
        self.tasks.sort(key=lambda span: (span.start_s, span.node))

    def is_done(self, node: str) -> bool:
        """Return whether the node has begun all its tasks; one that is not lost has then also ended them."""
        return self.position.get(node, 0) == len(self.order.get(node, ()))

    def _advance(self, node: str) -> None:
        """Run the node's tasks while their inputs have arrived."""
        tasks = self.order[node]
        gone_s = self.lost_s.get(node, math.inf)
        while self.position[node] < len(tasks):
            task = tasks[self.position[node]]
            arrival_s = self.arrived_s.get((node, task))
            if arrival_s is None:
                return
            start_s = max(arrival_s, self.free_s[node])
            end_s = start_s + self._duration_s(node, task)
            hop = self.hop_of[task.microbatch][node]
            if end_s > gone_s:
                if start_s < gone_s:
                    self.cut.append(TaskSpan(node, task.operation, task.microbatch, hop, start_s, gone_s))
                    self.position[node] += 1
                self.free_s[node] = math.inf
                return
            self.tasks.append(TaskSpan(node, task.operation, task.microbatch, hop, start_s, end_s))
            self.free_s[node] = end_s + self.costs.task_overhead_s
            self.position[node] += 1
            self._pass_on(node, task, hop, end_s)

    def _duration_s(self, node: str, task: Task) -> float:
        duration_s = self.table_s[task.operation][node]
        if task.operation == "B" and task.microbatch in self.split[node]:
            duration_s -= self.table_s["W"][node]
        return duration_s * self.slowdown.get(node, 1.0) * self._factor()

    def _factor(self) -> float:
        if self.jitter_sigma == 0:
            return 1.0
        return math.exp(self.generator.gauss(0.0, self.jitter_sigma))

    def _pass_on(self, node: str, task: Task, hop: int, end_s: float) -> None:
        """Hand the output of a finished task to its successor."""
        path = self.paths[task.microbatch]
        last = len(path) - 1
        if task.operation in ("F", "RF"):
            destination = path[hop + 1] if hop < last else path[0]
            self._send(node, task, destination, hop, "forward", end_s)
        elif task.operation == "L":
            self._send(node, task, path[last], last, "backward", end_s)
        elif task.operation in ("B", "RB"):
            self.arrived_s[node, Task("W", task.microbatch)] = end_s
            if hop > 0:
                self._send(node, task, path[hop - 1], hop - 1, "backward", end_s)

    def _send(self, source: str, maker: Task, destination: str, hop: int, direction: Direction, ready_s: float) -> None:
        """Hand the output of a task to the next one of its microbatch."""
        microbatch = maker.microbatch
        user: Operation
        if microbatch in self.relayed[destination]:
            user = "RF" if direction == "forward" else "RB"
        elif direction == "forward":
            user = "F" if hop < len(self.paths[microbatch]) - 1 else "L"
        else:
            user = "B"
        event = ready_s, microbatch, hop, source, destination, Task(user, microbatch), maker.operation, direction
        heapq.heappush(self.ready, event)

    def _deliver(self, event: _Event) -> None:
        """Start a transfer as soon as what it needs is free, and let its destination go on."""
        ready_s, _, _, source, destination, _, _, _ = event
        gone_s = self._gone_s(event)
        start_s = free_s = ready_s
        factor = self._factor()
        occupied = occupied_resources(self.costs.contention, source, destination)
        if occupied:
            for resource in occupied:
                start_s = max(start_s, self.resource_free_s.get(resource, 0.0))
            if start_s >= gone_s:
                return
            free_s = min(start_s + self.costs.occupancy_s(source, destination) * factor, gone_s)
            for resource in occupied:
                self.resource_free_s[resource] = free_s
        self._arrive(event, start_s, free_s, start_s + self.costs.transfer_s[source][destination] * factor)

    def _share(self, sharing: SharedLinks[_Offer]) -> None:
        """Go on to the next time at which a node is lost, a transfer becomes ready or one has left."""
        ready_s = self.ready[0][0] if self.ready else math.inf
        gone_s = self.gone[0][0] if self.gone else math.inf
        if gone_s <= min(ready_s, sharing.next_end_s):
            sharing.cut_off(self.gone.pop(0)[1], gone_s)
        elif ready_s <= sharing.next_end_s:
            event = heapq.heappop(self.ready)
            factor = self._factor()
            _, _, _, source, destination, _, _, _ = event
            if ready_s < self._gone_s(event):
                gbit = (self.costs.activation_bytes or 0) * 8e-9 * factor
                sharing.offer((source, destination), _Offer(event, factor), gbit, ready_s)
        else:
            carried = sharing.carry()
            source, destination = carried.ends
            latency_s = (self.costs.latency_s or {})[source][destination] * carried.content.factor
            self._arrive(carried.content.event, carried.start_s, carried.free_s, carried.free_s + latency_s)

    def _gone_s(self, event: _Event) -> float:
        """Return when the first of a transfer's ends is lost."""
        _, _, _, source, destination, _, _, _ = event
        return min(self.lost_s.get(source, math.inf), self.lost_s.get(destination, math.inf))

    def _arrive(self, event: _Event, start_s: float, free_s: float, end_s: float) -> None:
        """Hand a transfer to its destination, unless one of its ends is lost before."""
        ready_s, microbatch, hop, source, destination, user, maker, direction = event
        if end_s > self._gone_s(event):
            return
        self.transfers.append(
            TransferSpan(
                source, destination, microbatch, hop, direction, maker, user.operation, ready_s, start_s, end_s, free_s
            )
        )
        self.arrived_s[destination, user] = end_s
        self._advance(destination)

    def _who_waits(self) -> str:
        waiting = []
        for node, tasks in self.order.items():
            if self.position[node] < len(tasks):
                task = tasks[self.position[node]]
                name = OPERATION_NAMES[task.operation]
                waiting.append(f"{node} waits for the input of the {name} of microbatch {task.microbatch}")
        more = f" and {len(waiting) - 3} more" if len(waiting) > 3 else ""
        return f"the order deadlocks: {'; '.join(waiting[:3])}{more}"
