"""How many microbatches a node can hold between their forward and their backward."""

from math import ceil

from skippipe_scheduler.cluster import Node
from skippipe_scheduler.errors import InfeasibleError
from skippipe_scheduler.workload import Workload

GIB = 2**30
MIB = 2**20


def per_stage(layers: tuple[int, ...], layer: int, ends: int) -> tuple[int, ...]:
    """Return layers times `layer` for every stage, and `ends` more for stage 0."""
    return tuple(count * layer + (ends if stage == 0 else 0) for stage, count in enumerate(layers))


def microbatches_held(node: Node, workload: Workload, layers: tuple[int, ...], stage: int | None) -> int:
    """Return how many microbatches fit into the node, whichever stage it gets where `stage` is open.

    Raises `InfeasibleError` where that is none, naming what is needed and what would help.
    """
    if node.max_in_flight is not None or node.memory_gib is None:
        return node.max_in_flight or 1
    memory_bytes = int(node.memory_gib * GIB)
    state_bytes = per_stage(layers, workload.layer_state_bytes, workload.ends_state_bytes)
    resident_bytes = per_stage(layers, workload.layer_resident_bytes, workload.ends_resident_bytes)
    stages = range(len(layers)) if stage is None else (stage,)
    held = {one: (memory_bytes - state_bytes[one]) // max(1, resident_bytes[one]) for one in stages}
    if min(held.values()) >= 1:
        return min(held.values())
    worst = max(held, key=lambda one: state_bytes[one] + resident_bytes[one])
    needed_bytes = state_bytes[worst] + max(1, resident_bytes[worst])
    ends = worst == 0
    remedies = [f"raise its memory_gib to {ceil(100 * needed_bytes / GIB) / 100:g}"]
    left_bytes = memory_bytes - ends * (workload.ends_state_bytes + workload.ends_resident_bytes)
    layers_that_fit = left_bytes // max(1, workload.layer_state_bytes + workload.layer_resident_bytes)
    if layers_that_fit > 0:
        remedies.append(f"give stage {worst} at most {_layers(layers_that_fit)} (more stages, or layers_per_stage)")
    if state_bytes[worst] < memory_bytes:
        remedies.append("use a smaller micro-batch")
    if max(held.values()) >= 1:
        too_large = " and ".join(str(one) for one in held if held[one] < 1)
        remedies.append(f"fix the placement so that other nodes hold stage {too_large}")
    raise InfeasibleError(
        f"node {node.name!r} has {_size(memory_bytes)}, but stage {worst} needs {_size(needed_bytes)}: "
        f"weights, gradients and optimizer state of {_layers(layers[worst])}"
        f"{', embedding and head' if ends else ''} take {_size(state_bytes[worst])}, "
        f"one microbatch {_size(resident_bytes[worst])}; {', or '.join(remedies)}"
    )


def _layers(count: int) -> str:
    return f"{count} layer" if count == 1 else f"{count} layers"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.3g} GiB" if size_bytes >= GIB / 10 else f"{size_bytes / MIB:.3g} MiB"
