"""Bounds from what cards and uplinks have to carry, where transfers share them (contention "shared")."""

from collections.abc import Iterator

import numpy as np

from skippipe_scheduler.bounds.network import Network
from skippipe_scheduler.bounds.shares import least_linear_time_s
from skippipe_scheduler.bounds.walks import closed_walks_s

MESSAGES_OF_A_VISIT = 2
"""Each way: a forward and a backward come in and leave; at an origin the forward's output and the loss's gradient."""


def carrying_s(network: Network) -> float:
    """Return the least time in which cards and uplinks can carry what any plan sends through them."""
    return max((bound_s for bound_s, _ in _limits(network)), default=0.0)


def explain_carrying(network: Network, bound_s: float) -> str:
    """Return which card or uplink binds, and what would help."""
    _, what = max(_limits(network))
    return f"No plan is shorter than {bound_s:.3g} s: {what}."


def _limits(network: Network) -> Iterator[tuple[float, str]]:
    """Yield the seconds of each limit, and the words for it."""
    for stage in range(network.problem.num_stages):
        yield (
            _cards_s(network, stage),
            f"the network cards of the replicas of stage {stage} carry its messages no faster. Faster cards or more "
            "replicas would help",
        )
    for index, uplink in enumerate(network.problem.costs.uplinks or ()):
        yield (
            _crossings_s(network, index),
            f"what has to pass the uplink of {uplink.name} takes this long. A faster uplink would help, or replicas of "
            "more stages there",
        )
    yield (
        _sites_s(network),
        "no site has enough nodes for a route, and this is what all uplinks together need for the routes between them. "
        "Faster uplinks or shorter routes would help",
    )


def _gbit(network: Network) -> float:
    return (network.problem.costs.activation_bytes or 0) * 8e-9


def _cards_s(network: Network, stage: int) -> float:
    """Return the time in which the cards of a stage's replicas carry its microbatches."""
    problem = network.problem
    cards = problem.costs.card_gbit_per_s or {}
    names = [problem.nodes[node] for node in network.nodes_of_stage(stage)]
    visit_s = np.array(
        [
            MESSAGES_OF_A_VISIT * _gbit(network) / min(cards[name].up, cards[name].down) if name in cards else 0.0
            for name in names
        ]
    )
    items = network.slot_model.coverage[stage][0]
    return least_linear_time_s(np.zeros(len(names)), visit_s, problem.sizes[stage], items)


def _crossings_s(network: Network, index: int) -> float:
    """Return the time in which an uplink carries the fewest messages that routes of the origins' counts send over it.

    With a free placement none have to.
    """
    problem = network.problem
    if not network.fixed:
        return 0.0
    uplink = (problem.costs.uplinks or ())[index]
    inside = np.isin(problem.nodes, uplink.nodes)
    nothing = [np.zeros(len(inside)) for _ in network.nodes_of]
    avoided = np.zeros(len(inside), dtype=bool)
    # Each hop is passed forwards and backwards, so that a crossing uses both ways of the uplink once.
    crossings = closed_walks_s(network, (inside[:, None] != inside[None, :]).astype(float), nothing, avoided)
    if problem.free_origins:
        messages = problem.num_microbatches * float(crossings.min())
    else:
        messages = sum(count * float(each) for count, each in zip(network.counts, crossings, strict=True) if count)
    return messages * _gbit(network) / min(uplink.gbit_per_s.up, uplink.gbit_per_s.down)


def _sites_s(network: Network) -> float:
    """Return the time in which all uplinks together carry routes that are too long for the sites they begin in.

    A route through several sites passes each one's uplink in and out, forwards and backwards.
    """
    problem, uplinks = network.problem, network.problem.costs.uplinks or ()
    behind = [node for uplink in uplinks for node in uplink.nodes]
    if sorted(behind) != sorted(problem.nodes):
        return 0.0
    room = np.cumsum(sorted((len(uplink.nodes) for uplink in uplinks), reverse=True))
    messages = 0.0
    for length, count in problem.rules.length_counts(problem.num_microbatches).items():
        sites = int(np.searchsorted(room, length)) + 1
        messages += MESSAGES_OF_A_VISIT * count * sites if sites > 1 else 0.0
    up, down = (
        sum(gbit) for gbit in zip(*((each.gbit_per_s.up, each.gbit_per_s.down) for each in uplinks), strict=True)
    )
    return float(messages * _gbit(network) / min(up, down))
