"""A bound from the gradient reductions of all stages together, where the placement is free."""

from collections.abc import Iterator

import numpy as np

from skippipe_scheduler.bounds.network import Matrix, Network
from skippipe_scheduler.bounds.walks import Idle, idle_ends
from skippipe_scheduler.bounds.work import last_backwards_s
from skippipe_scheduler.slots.near_nodes import edges_s, growing_room, reduced_gbit, room_within_s


def reductions_s(network: Network, idle: Idle) -> float:
    """Return the least time in which all stages can do their work and then reduce their gradients.

    A stage reduces after the last backward of its replicas. In an iteration of t seconds they are connected by edges
    over which the reduction takes no more than what is left then (`near_nodes`).
    """
    return max((room_within_s(edge_s, sizes) for edge_s, sizes in _stages_together(network, idle)), default=0.0)


def explain_reductions(network: Network, bound_s: float) -> str:
    """Return how many stages fit where links are fast, and what would help."""
    edge_s, sizes = max(_stages_together(network, idle_ends(network)), key=lambda stages: room_within_s(*stages))
    room = max(room for within_s, room in growing_room(edge_s, sizes) if within_s < bound_s)
    return (
        f"No plan is shorter than {bound_s:.3g} s: of the {len(sizes)} stages with {min(sizes)} or more replicas, only "
        f"{room} have room where links are fast enough to reduce their gradients sooner after their work. Faster links "
        "between the others, fewer replicas of a stage or fewer bytes of gradients would help."
    )


def _stages_together(network: Network, idle: Idle) -> Iterator[tuple[Matrix, list[int]]]:
    """Yield, of the stages with at least so many replicas, the sizes, and when the iteration can end at the earliest if
    two nodes are an edge of one of their reductions, (N, N).
    """
    reduced = reduced_gbit(network.problem)
    done_s = last_backwards_s(network, idle)
    for least in sorted({size for size, _ in reduced if size > 1}):
        stages = [stage for stage, (size, _) in enumerate(reduced) if size >= least]
        kinds = {(*reduced[stage], done_s[stage]) for stage in stages}
        ends_s = [last_s + edges_s(network.slot_model, size, gbit) for size, gbit, last_s in kinds]
        yield np.minimum.reduce(ends_s), [reduced[stage][0] for stage in stages]
