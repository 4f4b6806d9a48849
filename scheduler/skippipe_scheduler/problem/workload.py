"""What one microbatch of a model costs, and how layers and nodes divide over stages."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from skippipe_scheduler.errors import InfeasibleError, ProblemError
from skippipe_scheduler.problem.cluster import Device


@dataclass(frozen=True)
class Workload:
    """Cost of one microbatch in FLOP and bytes. "Embedding and head" include the final norm; origins own them.

    Examples:
        >>> tokens, hidden_size, vocabulary = 4 * 1024, 1024, 32_000  # 4 samples of 1,024 tokens, in bfloat16
        >>> layer_parameters = 12 * hidden_size**2
        >>> workload = Workload(
        ...     num_layers=24,
        ...     layer_forward_flop=2 * tokens * layer_parameters,
        ...     loss_flop=6 * tokens * hidden_size * vocabulary,
        ...     activation_bytes=2 * tokens * hidden_size,
        ...     layer_gradient_bytes=2 * layer_parameters,
        ...     embedding_and_head_gradient_bytes=2 * hidden_size * vocabulary,
        ...     layer_state_bytes=16 * layer_parameters,
        ...     embedding_and_head_state_bytes=16 * hidden_size * vocabulary,
        ...     layer_resident_bytes=34 * tokens * hidden_size,
        ...     embedding_and_head_resident_bytes=2 * tokens * hidden_size,
        ... )
        >>> workload.activation_bytes
        8388608
        >>> Workload(**{**vars(workload), "num_layers": 0})
        Traceback (most recent call last):
        skippipe_scheduler.errors.ProblemError: workload.num_layers is 0; it must be a number of more than 0
    """

    num_layers: int
    """Layers of the model."""
    layer_forward_flop: float
    """FLOP of the forward of one layer."""
    loss_flop: float
    """FLOP of head and loss, forward and backward."""
    activation_bytes: int
    """Bytes that travel from stage to stage, and back as the gradient."""
    layer_gradient_bytes: int
    """Bytes of one layer's gradients, as the replicas reduce them."""
    embedding_and_head_gradient_bytes: int
    """The same of embedding and head."""
    layer_state_bytes: int
    """Bytes of one layer's parameters, gradients and optimizer state."""
    embedding_and_head_state_bytes: int
    """The same of embedding and head."""
    layer_resident_bytes: int
    """Bytes of one layer that are kept for one microbatch between its forward and its backward."""
    embedding_and_head_resident_bytes: int
    """The same of embedding and head."""
    stage_resident_bytes: int = 0
    """The same that a stage keeps whatever the number of its layers."""
    working_bytes: int = 0
    """Bytes that a task needs besides, once on a node."""
    embedding_and_head_working_bytes: int = 0
    """The same that a task of an origin needs at least."""
    message_bytes: int = 0
    """Bytes of what waits to be used or sent, once on a node, in host memory."""
    layer_shared_bytes: int = 0
    """Bytes of one layer's state beside `layer_state_bytes`, which the replicas of a stage share out among them."""
    layer_copy_bytes: int = 0
    """Bytes of one layer's state that an asynchronous checkpoint holds, in host memory."""
    embedding_and_head_copy_bytes: int = 0
    """The same of embedding and head."""
    layer_offloaded_bytes: int = 0
    """Bytes of `layer_shared_bytes` that lie in host memory."""
    embedding_and_head_offloaded_bytes: int = 0
    """Bytes of `embedding_and_head_state_bytes` that lie there."""
    layer_update_bytes: int = 0
    """Bytes of one layer that the optimizer needs when no microbatch is held any more."""
    embedding_and_head_update_bytes: int = 0
    """The same of embedding and head."""
    bucket_bytes: int = 0
    """Bytes that the reduction over replicas needs then, once on a node."""
    backward_to_forward: float = 2.0
    """FLOP of a layer's backward by those of its forward."""
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

    def on(self, device: Device) -> "Workload":
        """Return the workload as it counts in the memory of a node: host memory is its own where it has no GPU."""
        if device == "cpu":
            return self
        return replace(
            self,
            message_bytes=0,
            layer_copy_bytes=0,
            embedding_and_head_copy_bytes=0,
            layer_shared_bytes=self.layer_shared_bytes - self.layer_offloaded_bytes,
            embedding_and_head_state_bytes=self.embedding_and_head_state_bytes
            - self.embedding_and_head_offloaded_bytes,
            layer_offloaded_bytes=0,
            embedding_and_head_offloaded_bytes=0,
        )


class LighterWorkload(NamedTuple):
    """What could be done for less memory, in words, and what a microbatch costs then."""

    advice: str
    workload: Callable[[], Workload]
    """Asked for where a node's memory does not suffice."""


@dataclass(frozen=True)
class LighterWorkloads:
    """All that could be done for less memory, in groups of one kind with the mildest first."""

    groups: Sequence[Sequence[LighterWorkload]]
    last_resort: Sequence[LighterWorkload] = ()
    """Several changes together, for where none of the groups suffices."""

    def that_suffice(self, suffices: Callable[[Workload], bool]) -> list[str]:
        """Return the advice of each group that suffices first."""
        found = [_first(group, suffices) for group in self.groups]
        advice = [text for text in found if text is not None]
        together = None if advice else _first(self.last_resort, suffices)
        return advice if together is None else [together]


def _first(group: Sequence[LighterWorkload], suffices: Callable[[Workload], bool]) -> str | None:
    return next((option.advice for option in group if suffices(option.workload())), None)


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
