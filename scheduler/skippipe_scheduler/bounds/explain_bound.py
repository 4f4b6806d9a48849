"""Which bound binds, and what would help, in words."""

import math
from collections.abc import Mapping

from skippipe_scheduler.bounds.network import Network
from skippipe_scheduler.bounds.origins import waves_s
from skippipe_scheduler.bounds.walks import idle_ends, shortest_trips
from skippipe_scheduler.bounds.work import stage_work_s
from skippipe_scheduler.problem.problem import Problem


def explain_bound(problem: Problem, bounds: Mapping[str, float]) -> str:
    """Return one or two sentences on the largest of `bounds` (of `lower_bounds`); of equals, the simplest counts."""
    highest_s = max(bounds.values())
    name = next(name for name, bound_s in bounds.items() if bound_s >= highest_s * (1 - 1e-6))
    network = Network(problem)
    if name == "node work":
        return _explain_work(network, highest_s)
    if name in ("round trip", "origin waves", "origin schedule"):
        return _explain_origin(network, highest_s)
    return (
        f"No plan is shorter than {highest_s:.3g} s: whichever routes they take together, the microbatches of all "
        "origins fill the memory or the time of the nodes near them. More memory there, more near replicas or shorter "
        "routes would help."
    )


def _explain_work(network: Network, bound_s: float) -> str:
    idle = idle_ends(network)
    stage = max(range(network.problem.num_stages), key=lambda stage: stage_work_s(network, idle, stage))
    replicas = network.problem.sizes[stage]
    return (
        f"Stage {stage} is bound by the work of its {replicas} replica{'s' * (replicas != 1)} ({bound_s:.3g} s): "
        "give it more or faster replicas, or fewer layers."
    )


def _explain_origin(network: Network, bound_s: float) -> str:
    if network.problem.free_origins:
        return (
            f"However the origins divide {network.num_microbatches} microbatches, their round trips in waves take "
            f"{bound_s:.3g} s: give them memory for more, or nearer replicas of the stages that their routes visit."
        )
    origin, count = _slowest_origin(network)
    node = int(network.origins[origin])
    memory = int(network.memory[node])
    waves = math.ceil(count / memory)
    trip_s = float(shortest_trips(network).trip_s[origin])
    cure = f", or memory for {math.ceil(count / (waves - 1))}" if waves > 1 else ""
    where = "origin" if network.fixed else "even with the best origins,"
    return (
        f"{where.capitalize()} {network.problem.nodes[node]} is bound by its round trip of {trip_s:.3g} s in {waves} "
        f"wave{'s' * (waves != 1)} ({count} microbatches, memory for {memory}): no plan is shorter than "
        f"{bound_s:.3g} s. Give it fewer microbatches{cure}, or nearer replicas of the stages that it visits."
    )


def _slowest_origin(network: Network) -> tuple[int, int]:
    """Return the origin that binds and its microbatches (with a free placement, the last of the best ones)."""
    trips, size = shortest_trips(network), network.problem.sizes[0]
    counts = network.counts if network.fixed else (network.greatest_count,) * len(network.origins)
    order = sorted(range(len(counts)), key=lambda origin: waves_s(network, trips, origin, counts[origin]))
    binding = order[-1] if network.fixed else order[size - 1]
    return binding, counts[binding]
