"""What a node needs to hold its stage, and how many microbatches fit beside it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

from skippipe_scheduler.errors import InfeasibleError
from skippipe_scheduler.problem.cluster import Cluster, Node
from skippipe_scheduler.problem.workload import LighterWorkloads, Workload

GIB = 2**30
MIB = 2**20
WAITING_COPIES = 2
"""Rows that are sent to the replicas and received from them, of gradients on their way; there from the start."""


def per_stage(layers: tuple[int, ...], layer: int, embedding_and_head: int) -> tuple[int, ...]:
    """Return layers times `layer` for every stage, and `embedding_and_head` more for stage 0."""
    return tuple(count * layer + (embedding_and_head if stage == 0 else 0) for stage, count in enumerate(layers))


@dataclass(frozen=True)
class StageNeed:
    """Bytes that a stage takes on each of its nodes; see `Workload` for what the parts are."""

    state_bytes: int
    copy_bytes: int
    resident_bytes: int
    working_bytes: int
    message_bytes: int
    update_bytes: int

    @property
    def fixed_bytes(self) -> int:
        """What is taken however many microbatches are held: at least what the update needs."""
        return self.state_bytes + self.copy_bytes + max(self.working_bytes + self.message_bytes, self._update_rest)

    @property
    def _update_rest(self) -> int:
        return max(0, self.update_bytes - self.resident_bytes)

    def held(self, memory_bytes: int) -> int:
        """Return how many microbatches fit between their forward and their backward."""
        return (memory_bytes - self.fixed_bytes) // self.resident_bytes

    @property
    def least_bytes(self) -> int:
        """What is needed for a single microbatch."""
        return self.fixed_bytes + self.resident_bytes


def stage_needs(workload: Workload, layers: tuple[int, ...], sizes: Sequence[int]) -> tuple[StageNeed, ...]:
    """Return what every stage takes; stages have `layers` layers and `sizes` replicas."""
    state_bytes = per_stage(layers, workload.layer_state_bytes, workload.embedding_and_head_state_bytes)
    copy_bytes = per_stage(layers, workload.layer_copy_bytes, workload.embedding_and_head_copy_bytes)
    resident_bytes = per_stage(
        layers, max(1, workload.layer_resident_bytes), workload.embedding_and_head_resident_bytes
    )
    update_bytes = per_stage(layers, workload.layer_update_bytes, workload.embedding_and_head_update_bytes)
    gradient_bytes = per_stage(layers, workload.layer_gradient_bytes, workload.embedding_and_head_gradient_bytes)
    bucket_bytes = [min(workload.bucket_bytes, own) for own in gradient_bytes]
    shared_bytes = [ceil(count * workload.layer_shared_bytes / size) for count, size in zip(layers, sizes, strict=True)]
    return tuple(
        StageNeed(
            state_bytes=state_bytes[stage]
            + shared_bytes[stage]
            + (WAITING_COPIES * bucket_bytes[stage] if size > 1 else 0),
            copy_bytes=copy_bytes[stage] + (shared_bytes[stage] if copy_bytes[stage] else 0),
            resident_bytes=resident_bytes[stage] + workload.stage_resident_bytes,
            working_bytes=max(workload.working_bytes, workload.embedding_and_head_working_bytes if stage == 0 else 0),
            message_bytes=workload.message_bytes,
            update_bytes=max(update_bytes[stage], bucket_bytes[stage] if size > 1 else 0),
        )
        for stage, size in enumerate(sizes)
    )


def microbatches_held(
    cluster: Cluster,
    node: Node,
    workload: Workload,
    layers: tuple[int, ...],
    sizes: Sequence[int],
    stages: Sequence[int],
    lighter: LighterWorkloads | None = None,
) -> int:
    """Return how many microbatches fit into the node, whichever of `stages` it gets; stages have `sizes` replicas.

    Raises `InfeasibleError` where that is none, naming what is needed and what would help, of `lighter` what suffices.
    """
    if node.max_in_flight is not None or node.memory_gib is None:
        return node.max_in_flight or 1
    memory_bytes = int(node.memory_gib * GIB)
    needs = stage_needs(workload.on(cluster.device_of(node)), layers, sizes)
    least = min(needs[stage].held(memory_bytes) for stage in stages)
    if least < 1:
        worst = max(stages, key=lambda stage: needs[stage].least_bytes)
        raise InfeasibleError(_Conflict(cluster, node, workload, layers, sizes, worst, lighter), stage=worst)
    return least


def device_text(cluster: Cluster, node: Node, workload: Workload) -> str:
    """Return in parentheses what the node is taken to compute on; nothing where that changes no number."""
    if workload.on("cuda") == workload.on("cpu"):
        return ""
    assumed = ", assumed as the cluster file gives none" if cluster.assumes_device(node) else ""
    return f" (device {cluster.device_of(node)}{assumed})"


@dataclass(frozen=True)
class _Conflict:
    """Why `stage` does not fit into the memory of `node`; its text, made when it is asked for."""

    cluster: Cluster
    node: Node
    given: Workload
    layers: tuple[int, ...]
    sizes: Sequence[int]
    stage: int
    lighter: LighterWorkloads | None

    def __str__(self) -> str:
        need = self._needs(self.given)[self.stage]
        beside = ", embedding and head" if self.stage == 0 else ""
        rest_bytes = need.fixed_bytes - need.state_bytes
        of_rest = {"checkpoint copy": need.copy_bytes, "messages": need.message_bytes}
        named = ", ".join(name for name, size_bytes in of_rest.items() if size_bytes)
        rest = f", {named}{' and ' * bool(named)}the work of a task {size_text(rest_bytes)}" if rest_bytes else ""
        return (
            f"node {self.node.name!r}{device_text(self.cluster, self.node, self.given)} has "
            f"{size_text(self._memory_bytes)}, but stage {self.stage} needs {size_text(need.least_bytes)}: "
            f"weights, gradients and optimizer state of {_layers(self.layers[self.stage])}{beside} "
            f"take {size_text(need.state_bytes)}{rest}, one microbatch {size_text(need.resident_bytes)}; "
            f"{', or '.join(self._remedies(need))}"
        )

    @property
    def _memory_bytes(self) -> int:
        return int((self.node.memory_gib or 0) * GIB)

    def _needs(self, workload: Workload, node: Node | None = None) -> tuple[StageNeed, ...]:
        device = self.cluster.device_of(node or self.node)
        return stage_needs(workload.on(device), self.layers, self.sizes)

    def _remedies(self, need: StageNeed) -> Iterator[str]:
        yield f"raise its memory_gib to {ceil(100 * need.least_bytes / GIB) / 100:g}"
        fitting = self._fitting_layers(self.stage)
        ways = list(self._ways_to_fewer_layers())
        if 0 < fitting < self.layers[self.stage] and ways:
            yield f"give stage {self.stage} at most {_layers(fitting)} ({', or '.join(ways)})"
        if self.lighter is not None:
            yield from self.lighter.that_suffice(self._suffices)
        elif need.state_bytes < self._memory_bytes:
            yield "use a smaller micro-batch"
            yield "checkpoint activations"
        too_large = [stage for stage, other in enumerate(self._needs(self.given)) if other.held(self._memory_bytes) < 1]
        if len(too_large) < len(self.layers) and any(self._holds(other, self.stage) for other in self._others()):
            numbers = ", ".join(map(str, too_large))
            yield f"fix the placement so that other nodes hold stage{'s' * (len(too_large) > 1)} {numbers}"

    def _suffices(self, workload: Workload) -> bool:
        return self._needs(workload)[self.stage].held(self._memory_bytes) >= 1

    def _fitting_layers(self, stage: int) -> int:
        """Return how many layers the node could hold as this stage; 0 or less where it cannot even hold one."""
        workload = self.given.on(self.cluster.device_of(self.node))
        one_layer = stage_needs(workload, (1,) * len(self.layers), (1,) * len(self.layers))[stage]
        layer_bytes = (
            workload.layer_state_bytes
            + workload.layer_shared_bytes
            + workload.layer_copy_bytes
            + max(1, workload.layer_resident_bytes)
        )
        return (self._memory_bytes - one_layer.least_bytes) // layer_bytes + 1

    def _ways_to_fewer_layers(self) -> Iterator[str]:
        if len(self.layers) < min(sum(self.layers), len(self.cluster.members())):
            yield "more stages"
        # Where others have more memory than this node, more may fit there than is counted here.
        room = sum(max(0, self._fitting_layers(stage)) for stage in range(len(self.layers)))
        if room >= sum(self.layers) or any(self._is_roomier(node) for node in self._others()):
            yield "layers_per_stage"

    def _others(self) -> list[Node]:
        return [node for node in self.cluster.members() if node.name != self.node.name]

    def _is_roomier(self, other: Node) -> bool:
        return other.memory_gib is None or other.memory_gib > (self.node.memory_gib or 0)

    def _holds(self, other: Node, stage: int) -> bool:
        """Whether another node has room for the stage."""
        if other.memory_gib is None:
            return True
        return self._needs(self.given, other)[stage].held(int(other.memory_gib * GIB)) >= 1


def _layers(count: int) -> str:
    return f"{count} layer" if count == 1 else f"{count} layers"


def size_text(size_bytes: int) -> str:
    """Return bytes as people read them."""
    return f"{size_bytes / GIB:.3g} GiB" if size_bytes >= GIB / 10 else f"{size_bytes / MIB:.3g} MiB"
