"""What one microbatch of a model costs, and how layers and nodes divide over stages."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from skippipe_scheduler.errors import InfeasibleError, ProblemError


@dataclass(frozen=True)
class Workload:
    """Cost of one microbatch in FLOP and bytes. "Embedding and head" include the final norm; origins own them.

    `loss_flop` is head and loss, forward and backward. State is parameters, gradients and optimizer;
    `layer_shared_bytes` is the part of it that the replicas of a stage share out among them. Copies are what an
    asynchronous checkpoint holds of it. Resident bytes are what is kept for one microbatch between its forward and its
    backward. The rest is there once on a node: working bytes are what a task needs besides (that of an origin at least
    `embedding_and_head_working_bytes`), message bytes what waits to be used or sent, update bytes what the optimizer
    needs when no microbatch is held any more, and a bucket what the reduction over replicas needs then.
    """

    num_layers: int
    layer_forward_flop: float
    loss_flop: float
    activation_bytes: int
    layer_gradient_bytes: int
    embedding_and_head_gradient_bytes: int
    layer_state_bytes: int
    embedding_and_head_state_bytes: int
    layer_resident_bytes: int
    embedding_and_head_resident_bytes: int
    stage_resident_bytes: int = 0
    working_bytes: int = 0
    embedding_and_head_working_bytes: int = 0
    message_bytes: int = 0
    layer_shared_bytes: int = 0
    layer_copy_bytes: int = 0
    embedding_and_head_copy_bytes: int = 0
    layer_update_bytes: int = 0
    embedding_and_head_update_bytes: int = 0
    bucket_bytes: int = 0
    backward_to_forward: float = 2.0
    weight_share: float = 0.0
    """Share of a backward that weight gradients take; 0 where backwards are not to be split."""

    def __post_init__(self) -> None:
        positive = {"num_layers", "layer_forward_flop", "activation_bytes", "layer_gradient_bytes"}
        positive |= {"backward_to_forward"}
        if self.weight_share >= 1:
            raise ProblemError(f"workload.weight_share is {self.weight_share}; it must be a share less than 1")
        for field in fields(self):
            value = getattr(self, field.name)
            if not math.isfinite(value) or value < 0 or (value == 0 and field.name in positive):
                wanted = "more than 0" if field.name in positive else "at least 0"
                raise ProblemError(f"workload.{field.name} is {value}; it must be a number of {wanted}")


def split_layers(num_layers: int, num_stages: int, layers_per_stage: Sequence[int] | None = None) -> tuple[int, ...]:
    """Return the layers of each stage: as given and checked, else as even as possible.

    Layers left over go to the stages after the first, because stage 0 also has embedding, head and loss.
    Raises `ProblemError` where layers and stages do not fit.
    """
    if num_stages > num_layers:
        raise ProblemError(
            f"{num_stages} stages need at least {num_stages} layers, the model has {num_layers}; use fewer stages"
        )
    if layers_per_stage is None:
        share, rest = divmod(num_layers, num_stages)
        return tuple(share + (1 <= stage <= rest) for stage in range(num_stages))
    if len(layers_per_stage) != num_stages:
        raise ProblemError(f"layers_per_stage has {len(layers_per_stage)} entries for {num_stages} stages")
    if min(layers_per_stage) < 1:
        stage = list(layers_per_stage).index(min(layers_per_stage))
        raise ProblemError(f"layers_per_stage: stage {stage} has {min(layers_per_stage)} layers; give it at least 1")
    if sum(layers_per_stage) != num_layers:
        raise ProblemError(f"layers_per_stage adds up to {sum(layers_per_stage)} layers, the model has {num_layers}")
    return tuple(layers_per_stage)


def route_length(num_stages: int, skip_ratio: float) -> int:
    """Return how many stages a microbatch visits: (1 - skip_ratio) * num_stages, rounded, halves up.

    Raises `ProblemError` where fewer than 2 stages would be left, naming the largest ratio that works.
    """
    if num_stages < 2:
        raise ProblemError(f"num_stages is {num_stages}; a pipeline needs at least 2 stages")
    if not 0 <= skip_ratio < 1:
        raise ProblemError(f"skip_ratio is {skip_ratio}; it must be at least 0 and less than 1")
    # Rounded first, so that 0.7 * 5 counts as a half although floats make it 3.4999...
    length = math.floor(round((1 - skip_ratio) * num_stages, 9) + 0.5)
    if length < 2:
        largest = math.floor(100 * (1 - 1.5 / num_stages)) / 100
        raise ProblemError(
            f"skip_ratio {skip_ratio} leaves {length} of {num_stages} stages, a route needs at least 2; "
            f"the largest ratio that works with {num_stages} stages is {largest}"
        )
    return length


def stage_sizes(
    num_nodes: int, num_stages: int, route_length: float, protected_stages: Sequence[int] = ()
) -> tuple[int, ...]:
    """Return the replicas of each stage, so that every node gets about the same number of microbatches.

    Every microbatch visits stage 0 and those protected, and the others by equal chances, P stages in all (the
    `route_length`, or the mean of a mix). So a stage that all visit gets num_nodes / P. The other stages are equal to
    within one. (SkipPipe, arXiv 2502.19913, reference code: 20 nodes, S = 6, P = 4 give 5, 3, 3, 3, 3, 3.)
    Raises `InfeasibleError` with fewer nodes than stages.
    """
    if num_nodes < num_stages:
        raise InfeasibleError(
            f"{num_stages} stages need at least {num_stages} nodes, the cluster has {num_nodes}; "
            "use fewer stages or more nodes"
        )
    always = sorted({0, *protected_stages})
    others = [stage for stage in range(num_stages) if stage not in always]
    size_of_always = max(1, min(math.floor(num_nodes / route_length + 0.5), (num_nodes - len(others)) // len(always)))
    sizes = dict.fromkeys(always, size_of_always)
    share, rest = divmod(num_nodes - size_of_always * len(always), len(others) or len(always))
    for place, stage in enumerate(others or always):
        sizes[stage] = sizes.get(stage, 0) + share + (place < rest)
    return tuple(sizes[stage] for stage in range(num_stages))
