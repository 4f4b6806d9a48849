"""What every node and link does in one iteration: where the time goes, what is held, what queues."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from skippipe_scheduler.plan.plan import Operation, Plan, split_backwards
from skippipe_scheduler.plan.simulate import TaskSpan, Timeline, TransferSpan, ends_hold, inputs, simulate
from skippipe_scheduler.problem.costs import Costs

LOAD_PARTS = 100
"""The load is given for this many equal parts of the iteration. Chosen: as many as a figure shows."""


@dataclass(frozen=True)
class NodeAnalysis:
    """How one node spends the iteration, in seconds; the six parts below add up to it.

    `busy_s` computing; `overhead_s` between tasks; `exposed_communication_s` idle while the input of the next task is
    on its way (`exposed_queueing_s` of that while it queues for its link); `waiting_s` idle while another node has yet
    to make that input; `reduction_s` reducing gradients; `ending_s` after the last task otherwise.
    `held` is a step series: from each second on, so many microbatches are held. `load` is the share of time spent
    computing in each of `LOAD_PARTS` equal parts of the iteration.
    """

    node: str
    stage: int
    region: str | None
    num_tasks: int
    busy_s: float
    overhead_s: float
    exposed_communication_s: float
    exposed_queueing_s: float
    waiting_s: float
    reduction_s: float
    ending_s: float
    utilisation: float
    held: tuple[tuple[float, int], ...]
    peak_held: int
    memory: int
    load: tuple[float, ...]


@dataclass(frozen=True)
class LinkAnalysis:
    """What one directed link carries in an iteration.

    `num_bytes` is None where the plan does not tell the size of an activation. `occupied_s` is the time for which
    bytes are on the wire: it comes from the bandwidth where that is known, else it includes the latency.
    """

    source: str
    destination: str
    num_transfers: int
    num_bytes: int | None
    occupied_s: float
    occupancy: float
    queued_s: float
    longest_queue_s: float


@dataclass(frozen=True)
class Analysis:
    """What every node and link does in one iteration of a plan.

    Examples:
        >>> analysis = analyse(plan)
        >>> [node.node for node in analysis.nodes] == list(plan.nodes)
        True
        >>> max(node.peak_held for node in analysis.nodes) <= max(plan.costs.memory.values())
        True
    """

    iteration_s: float
    """Seconds of the whole iteration."""
    pipeline_s: float
    """Seconds until the last task has ended."""
    reduce_exposed_s: float
    """Seconds of gradient reduction after that."""
    bubble_fraction: float
    """Share of all nodes' time in which they compute nothing."""
    nodes: tuple[NodeAnalysis, ...]
    """In rank order."""
    links: tuple[LinkAnalysis, ...]
    """Directed links that carry something, from the most occupied to the least."""


def analyse(plan: Plan, timeline: Timeline | None = None) -> Analysis:
    """Say where the time of every node and link goes.

    Args:
        plan: The plan.
        timeline: A complete simulation of it; the exact one where not given.

    Returns:
        One entry for each node, and for each directed link that carries something.

    Raises:
        DeadlockError: The order of the plan makes nodes wait for each other.

    Examples:
        >>> analysis = analyse(plan)
        >>> busy_s = sum(node.busy_s for node in analysis.nodes) / len(analysis.nodes)
        >>> abs(busy_s - (1 - analysis.bubble_fraction) * analysis.iteration_s) < 1e-9
        True
    """
    simulated = timeline or simulate(plan)
    return Analysis(
        simulated.iteration_s,
        simulated.pipeline_s,
        simulated.reduce_exposed_s,
        simulated.bubble_fraction,
        _nodes(plan, simulated),
        _links(plan.costs, simulated),
    )


def held_over_time(tasks: Sequence[TaskSpan]) -> tuple[tuple[float, int], ...]:
    """Return the steps (second, microbatches held from then on) of one node, whose `tasks` are in order of time."""
    changes: list[tuple[float, int]] = [(0.0, 0)]
    split = split_backwards((task.operation, task.microbatch) for task in tasks)
    for task in tasks:
        if task.operation == "F":
            changes.append((task.start_s, changes[-1][1] + 1))
        elif ends_hold(task, split):
            changes.append((task.end_s, changes[-1][1] - 1))
    return tuple(changes)


def load_over_time(tasks: Iterable[TaskSpan], iteration_s: float, parts: int = LOAD_PARTS) -> tuple[float, ...]:
    """Return the share of time that `tasks` fill in each of `parts` equal parts of the iteration."""
    width_s = iteration_s / parts
    filled_s = [0.0] * parts
    for task in tasks:
        if width_s == 0:
            break
        first, last = int(task.start_s / width_s), int(task.end_s / width_s)
        for part in range(min(first, parts - 1), min(last, parts - 1) + 1):
            filled_s[part] += max(0.0, min(task.end_s, (part + 1) * width_s) - max(task.start_s, part * width_s))
    return tuple(min(1.0, filled / width_s) if width_s else 0.0 for filled in filled_s)


def _nodes(plan: Plan, timeline: Timeline) -> tuple[NodeAnalysis, ...]:
    tasks: dict[str, list[TaskSpan]] = defaultdict(list)
    for task in timeline.tasks:
        tasks[task.node].append(task)
    reduction_s: dict[str, float] = defaultdict(float)
    for span in timeline.reductions:
        for node in plan.stages[span.stage].nodes:
            reduction_s[node] = span.end_s - span.start_s
    arrivals = inputs(timeline)
    regions = plan.regions or (None,) * len(plan.nodes)
    return tuple(
        _node(plan, timeline, node, region, tasks[node], arrivals, reduction_s[node])
        for node, region in zip(plan.nodes, regions, strict=True)
    )


def _node(
    plan: Plan,
    timeline: Timeline,
    node: str,
    region: str | None,
    tasks: Sequence[TaskSpan],
    arrivals: dict[tuple[str, Operation, int], TransferSpan],
    reduction_s: float,
) -> NodeAnalysis:
    iteration_s = timeline.iteration_s
    idle = _IdleTime()
    for task in tasks:
        idle.before(task, arrivals.get((node, task.operation, task.microbatch)), plan.costs.task_overhead_s)
    last_s = tasks[-1].end_s if tasks else 0.0
    return NodeAnalysis(
        node=node,
        stage=plan.stage_of[node],
        region=region,
        num_tasks=len(tasks),
        busy_s=timeline.busy_s[node],
        overhead_s=idle.overhead_s,
        exposed_communication_s=idle.exposed_s,
        exposed_queueing_s=idle.queueing_s,
        waiting_s=idle.waiting_s,
        reduction_s=reduction_s,
        ending_s=iteration_s - last_s - reduction_s,
        utilisation=timeline.busy_s[node] / iteration_s if iteration_s else 0.0,
        held=held_over_time(tasks),
        peak_held=timeline.peak_memory[node],
        memory=plan.costs.memory[node],
        load=load_over_time(tasks, iteration_s),
    )


@dataclass
class _IdleTime:
    """Adds up why a node was idle before each of its tasks."""

    end_s: float | None = None
    overhead_s: float = 0.0
    exposed_s: float = 0.0
    queueing_s: float = 0.0
    waiting_s: float = 0.0

    def before(self, task: TaskSpan, arrival: TransferSpan | None, overhead_s: float) -> None:
        """Take the next task of the node and the transfer that brought its input, if one did."""
        idle_s = 0.0
        if self.end_s is not None:
            idle_s = min(self.end_s + overhead_s, task.start_s)
            self.overhead_s += idle_s - self.end_s
        if arrival is not None:
            sent_s = min(max(arrival.ready_s, idle_s), task.start_s)
            on_the_wire_s = min(max(arrival.start_s, sent_s), task.start_s)
            self.exposed_s += task.start_s - sent_s
            self.queueing_s += on_the_wire_s - sent_s
            self.waiting_s += sent_s - idle_s
        self.end_s = task.end_s


def _links(costs: Costs, timeline: Timeline) -> tuple[LinkAnalysis, ...]:
    carried: dict[tuple[str, str], list[TransferSpan]] = defaultdict(list)
    for span in timeline.transfers:
        carried[span.source, span.destination].append(span)
    links = [_link(costs, source, sink, spans, timeline.iteration_s) for (source, sink), spans in carried.items()]
    return tuple(sorted(links, key=lambda link: (-link.occupied_s, link.source, link.destination)))


def _link(
    costs: Costs, source: str, destination: str, spans: Sequence[TransferSpan], iteration_s: float
) -> LinkAnalysis:
    size_bytes = costs.activation_bytes
    if costs.contention != "none":
        occupied_s = sum(span.free_s - span.start_s for span in spans)
    elif size_bytes is not None and costs.gbit_per_s is not None:
        occupied_s = len(spans) * size_bytes * 8e-9 / costs.gbit_per_s[source][destination]
    else:
        occupied_s = sum(span.end_s - span.start_s for span in spans)
    return LinkAnalysis(
        source=source,
        destination=destination,
        num_transfers=len(spans),
        num_bytes=None if size_bytes is None else size_bytes * len(spans),
        occupied_s=occupied_s,
        occupancy=occupied_s / iteration_s if iteration_s else 0.0,
        queued_s=sum(span.start_s - span.ready_s for span in spans),
        longest_queue_s=max(span.start_s - span.ready_s for span in spans),
    )
