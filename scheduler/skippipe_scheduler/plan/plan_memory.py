"""How much memory each node of a plan needs at its peak, part by part."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from skippipe_scheduler.errors import InfeasibleError
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.simulate import Timeline, ends_hold, simulate
from skippipe_scheduler.problem.cluster import Device, Node
from skippipe_scheduler.problem.memory import GIB, StageNeed, size_text, stage_needs
from skippipe_scheduler.problem.workload import Workload

ALL_COUNTS: Mapping[str, Device] = MappingProxyType({})
"""Nothing is known of what nodes compute on: all that a workload has counts everywhere."""


@dataclass(frozen=True)
class MemoryEstimate:
    """The peak of one node. Activations, work and messages come and go; the update begins when they are gone."""

    node: str
    stage: int
    layers: int
    """Of the stage."""
    held: int
    """Microbatches between their forward and their backward at the peak."""
    state_bytes: int
    """Parameters, gradients and optimizer."""
    copy_bytes: int
    """The copy that a checkpoint is written from."""
    activation_bytes: int
    working_bytes: int
    message_bytes: int
    update_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it at the peak."""
        pipeline_bytes = self.activation_bytes + self.working_bytes + self.message_bytes
        return self.state_bytes + self.copy_bytes + max(pipeline_bytes, self.update_bytes)

    def __str__(self) -> str:
        """Describe the parts for a message."""
        held = f"{self.held} microbatch{'es' * (self.held != 1)}"
        parts = {
            "weights, gradients and optimizer state": self.state_bytes,
            "checkpoint copy": self.copy_bytes,
            held: self.activation_bytes,
            "work of a task": self.working_bytes,
            "messages": self.message_bytes,
            "reduction and optimizer step, after these": self.update_bytes,
        }
        return ", ".join(f"{name} {size_text(size_bytes)}" for name, size_bytes in parts.items() if size_bytes)


def plan_memory(
    plan: Plan, workload: Workload, devices: Mapping[str, Device] = ALL_COUNTS
) -> tuple[MemoryEstimate, ...]:
    """Return the estimate for every node of `plan`, in rank order; messages wait as long as the plan's times say.

    `devices` is what nodes compute on (`Cluster.devices`); what is not there counts as a CPU, where everything counts.
    """
    sizes = [max(1, len(stage.nodes)) for stage in plan.stages]  # an absent stage takes nothing on any node
    counted = {node: workload.on(devices.get(node, "cpu")) for node in plan.nodes}
    needs = {node: stage_needs(own, plan.layers_per_stage, sizes)[plan.stage_of[node]] for node, own in counted.items()}
    loads = _loads(plan, simulate(plan), needs, counted)
    return tuple(_estimate(plan, node, needs[node], counted[node], loads[node]) for node in plan.nodes)


def memory_of_one_process(plan: Plan, workload: Workload, device: Device = "cpu") -> MemoryEstimate:
    """Return the estimate where one process runs all stages, one microbatch after another, without replicas."""
    needs = stage_needs(workload.on(device), plan.layers_per_stage, [1] * len(plan.stages))
    routes = [{plan.stage_of[node] for node in route.route} for route in plan.microbatches]
    return MemoryEstimate(
        node="all",
        stage=0,
        layers=sum(plan.layers_per_stage),
        held=1,
        state_bytes=sum(need.state_bytes for need in needs),
        copy_bytes=sum(need.copy_bytes for need in needs),
        activation_bytes=max(sum(needs[stage].resident_bytes for stage in route) for route in routes),
        working_bytes=max(need.working_bytes for need in needs),
        message_bytes=0,
        update_bytes=sum(need.update_bytes for need in needs),
    )


def general_advice(estimate: MemoryEstimate, limit_bytes: int) -> Iterator[str]:
    """Yield what makes a workload lighter, of which nothing is known but the estimate."""
    if estimate.state_bytes + estimate.copy_bytes < limit_bytes:
        yield "use a smaller micro-batch"
        yield "checkpoint activations"


def check_memory(
    estimates: Sequence[MemoryEstimate],
    limits_bytes: Mapping[str, int],
    *,
    named: str = "its memory_gib",
    device_texts: Mapping[str, str] = MappingProxyType({}),
    advice: Callable[[MemoryEstimate, int], Iterable[str]] = general_advice,
) -> None:
    """Raise `InfeasibleError`, naming the parts and what would help, where a node needs more than its limit.

    `device_texts` says of nodes what they compute on (`problem.memory.device_text`). `advice` is asked what makes a
    workload lighter, for the estimate and the limit in bytes that conflict.
    """
    for estimate in estimates:
        limit_bytes = limits_bytes.get(estimate.node)
        if limit_bytes is not None and estimate.total_bytes > limit_bytes:
            remedies = [f"raise {named}", *["give the stage fewer layers"] * (estimate.layers > 1)]
            remedies += advice(estimate, limit_bytes)
            raise InfeasibleError(
                f"node {estimate.node!r} (stage {estimate.stage}){device_texts.get(estimate.node, '')} has "
                f"{size_text(limit_bytes)}, but the plan needs {size_text(estimate.total_bytes)} there: {estimate}; "
                f"{', '.join(remedies)}, or make a new plan for this cluster",
                stage=estimate.stage,
            )


def given_limits(nodes: Sequence[Node]) -> dict[str, int]:
    """Return the bytes of the nodes whose `memory_gib` is given."""
    return {node.name: int(node.memory_gib * GIB) for node in nodes if node.memory_gib is not None}


@dataclass
class _Load:
    """What is on a node besides its state: the present, and the greatest so far with its parts."""

    held: int = 0
    messages: int = 0
    working_bytes: int = 0
    peak_bytes: int = -1
    peak: tuple[int, int, int] = field(default=(0, 0, 0))


def _loads(
    plan: Plan, timeline: Timeline, needs: Mapping[str, StageNeed], counted: Mapping[str, Workload]
) -> dict[str, _Load]:
    """Follow every node through the iteration.

    A received message takes room from the start of its transfer until the task that uses it begins; from there it
    counts as what that task keeps or works with. A gradient takes room until it has been sent, and so does what a
    relay passes on. Any other activation that is sent is kept anyway, until its backward.
    """
    begins = {(task.node, task.operation, task.microbatch): task.start_s for task in timeline.tasks}
    changes: dict[str, list[tuple[float, int, str, int]]] = defaultdict(list)
    for task in timeline.tasks:
        working_bytes = 0 if task.operation in ("RF", "RB") else needs[task.node].working_bytes
        if task.operation == "F":
            changes[task.node].append((task.start_s, 1, "held", 1))
        changes[task.node] += [(task.start_s, 1, "working", working_bytes), (task.end_s, 0, "working", 0)]
        if ends_hold(task, plan.split_of[task.node]):
            changes[task.node].append((task.end_s, 0, "held", -1))
    for transfer in timeline.transfers:
        until_s = begins[transfer.destination, transfer.user, transfer.microbatch]
        changes[transfer.destination] += [(transfer.start_s, 1, "message", 1), (until_s, 0, "message", -1)]
        if transfer.direction == "backward" or transfer.maker == "RF":
            changes[transfer.source] += [(transfer.ready_s, 1, "message", 1), (transfer.end_s, 0, "message", -1)]
    loads = {}
    for node in plan.nodes:
        load = _Load()
        resident_bytes = needs[node].resident_bytes
        one_message_bytes = _message_bytes(counted[node])
        for _, _, what, amount in sorted(changes[node]):
            if what == "held":
                load.held += amount
            elif what == "message":
                load.messages += amount
            else:
                load.working_bytes = amount
            now_bytes = load.held * resident_bytes + load.messages * one_message_bytes + load.working_bytes
            if now_bytes > load.peak_bytes:
                load.peak_bytes, load.peak = now_bytes, (load.held, load.messages, load.working_bytes)
        loads[node] = load
    return loads


def _estimate(plan: Plan, node: str, need: StageNeed, workload: Workload, load: _Load) -> MemoryEstimate:
    held, messages, working_bytes = load.peak
    stage = plan.stage_of[node]
    # Where the state is whole on every replica, the first of them writes the checkpoint.
    writes = node == plan.stages[stage].nodes[0] or workload.layer_shared_bytes > 0
    return MemoryEstimate(
        node=node,
        stage=stage,
        layers=plan.layers_per_stage[stage],
        held=held,
        state_bytes=need.state_bytes,
        copy_bytes=need.copy_bytes if writes else 0,
        activation_bytes=held * need.resident_bytes,
        working_bytes=working_bytes,
        message_bytes=messages * _message_bytes(workload),
        update_bytes=need.update_bytes,
    )


def _message_bytes(workload: Workload) -> int:
    """Return what one message takes of the node's memory: nothing where they lie in the host memory of a GPU."""
    return workload.activation_bytes if workload.message_bytes else 0
