"""How many microbatches a node can hold between their forward and their backward."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

from skippipe_scheduler.cluster import Node
from skippipe_scheduler.errors import InfeasibleError
from skippipe_scheduler.workload import Workload

GIB = 2**30
MIB = 2**20


def per_stage(layers: tuple[int, ...], layer: int, ends: int) -> tuple[int, ...]:
    """Return layers times `layer` for every stage, and `ends` more for stage 0."""
    return tuple(count * layer + (ends if stage == 0 else 0) for stage, count in enumerate(layers))


def microbatches_held(
    node: Node, workload: Workload, layers: tuple[int, ...], sizes: Sequence[int], stages: Sequence[int]
) -> int:
    """Return how many microbatches fit into the node, whichever of `stages` it gets; stages have `sizes` replicas.

    Raises `InfeasibleError` where that is none, naming what is needed and what would help.
    """
    if node.max_in_flight is not None or node.memory_gib is None:
        return node.max_in_flight or 1
    state_bytes = per_stage(layers, workload.layer_state_bytes, workload.ends_state_bytes)
    need = _Need(
        int(node.memory_gib * GIB),
        tuple(
            size_bytes + workload.working_bytes + ceil(count * workload.layer_shared_bytes / size)
            for size_bytes, count, size in zip(state_bytes, layers, sizes, strict=True)
        ),
        per_stage(layers, max(1, workload.layer_resident_bytes), workload.ends_resident_bytes),
    )
    least = min(need.held(one) for one in stages)
    if least < 1:
        worst = max(stages, key=need.bytes_of)
        raise InfeasibleError(f"node {node.name!r} {_conflict(need, workload, layers, worst)}", stage=worst)
    return least


@dataclass(frozen=True)
class _Need:
    """What a node has, and what each stage takes at all and for each microbatch, in bytes."""

    memory_bytes: int
    state_bytes: tuple[int, ...]
    resident_bytes: tuple[int, ...]

    def held(self, stage: int) -> int:
        return (self.memory_bytes - self.state_bytes[stage]) // self.resident_bytes[stage]

    def bytes_of(self, stage: int) -> int:
        return self.state_bytes[stage] + self.resident_bytes[stage]


def _conflict(need: _Need, workload: Workload, layers: tuple[int, ...], stage: int) -> str:
    ends = ", embedding and head" if stage == 0 else ""
    again = " (and one layer that is computed again)" if workload.working_bytes else ""
    return (
        f"has {_size(need.memory_bytes)}, but stage {stage} needs {_size(need.bytes_of(stage))}: "
        f"weights, gradients and optimizer state of {_layers(layers[stage])}{ends}{again} "
        f"take {_size(need.state_bytes[stage])}, one microbatch {_size(need.resident_bytes[stage])}; "
        f"{', or '.join(_remedies(need, workload, stage))}"
    )


def _remedies(need: _Need, workload: Workload, stage: int) -> Iterator[str]:
    yield f"raise its memory_gib to {ceil(100 * need.bytes_of(stage) / GIB) / 100:g}"
    ends_bytes = workload.ends_state_bytes + workload.ends_resident_bytes if stage == 0 else 0
    ends_bytes += workload.working_bytes
    layer_bytes = workload.layer_state_bytes + workload.layer_shared_bytes + max(1, workload.layer_resident_bytes)
    fitting = (need.memory_bytes - ends_bytes) // layer_bytes
    if fitting > 0:
        yield f"give stage {stage} at most {_layers(fitting)} (more stages, or layers_per_stage)"
    if need.state_bytes[stage] < need.memory_bytes:
        yield "use a smaller micro-batch"
        if not workload.working_bytes:
            yield "checkpoint activations"
    too_large = [one for one in range(len(need.state_bytes)) if need.held(one) < 1]
    if len(too_large) < len(need.state_bytes):
        numbers = ", ".join(map(str, too_large))
        yield f"fix the placement so that other nodes hold stage{'s' * (len(too_large) > 1)} {numbers}"


def _layers(count: int) -> str:
    return f"{count} layer" if count == 1 else f"{count} layers"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.3g} GiB" if size_bytes >= GIB / 10 else f"{size_bytes / MIB:.3g} MiB"
