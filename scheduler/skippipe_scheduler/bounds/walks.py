"""Shortest walks through a network, by dynamic programming over the states of its automaton."""

from dataclasses import dataclass

import numpy as np

from skippipe_scheduler.bounds.network import Mask, Matrix, Network, Vector

MOST_STEPS = 1e8
"""Additions up to which shortest walks are exact; beyond, the shortest hops alone count. Chosen: about a second."""


def closed_walks_s(network: Network, hop_s: Matrix, visit_s: list[Vector], avoided: Mask) -> Vector:
    """Return for each origin the least sum of hops and visits over all legal closed walks (the origin's visit is 0)
    that no node in `avoided` is on but as the origin.

    Where an origin has none, or the network has more than `MOST_STEPS`, a bound from the shortest hops alone.
    """
    if network.steps > MOST_STEPS:
        return _shortest_hops_s(network, hop_s, visit_s)
    automaton, origins = network.automaton, network.origins
    apart = _no_self_loops(hop_s)
    lengths: list[Matrix | None] = [None] * len(automaton.stage)
    lengths[0] = np.where(origins[:, None] == network.nodes_of[0], 0.0, np.inf)
    best = np.full(len(origins), np.inf)
    for state, successors in enumerate(automaton.next_states):
        here, length = network.nodes_of[automaton.stage[state]], lengths[state]
        if length is None:
            continue
        if automaton.accepts[state]:
            best = np.minimum(best, (length + apart[np.ix_(here, origins)].T).min(axis=1))
        for successor in successors:
            stage = automaton.stage[successor]
            there = network.nodes_of[stage]
            hops_s = apart[np.ix_(here, there)]
            reached = np.array([(row[:, None] + hops_s).min(axis=0) for row in length]) + visit_s[stage][there]
            reached[(origins[:, None] == there) | avoided[there]] = np.inf
            known = lengths[successor]
            lengths[successor] = reached if known is None else np.minimum(known, reached)
        lengths[state] = None
    return best


def _shortest_hops_s(network: Network, hop_s: Matrix, visit_s: list[Vector]) -> Vector:
    visits = network.problem.rules.lengths[0] - 1
    apart = _no_self_loops(hop_s)
    away_s, home_s = apart.min(axis=1)[network.origins], apart.min(axis=0)[network.origins]
    least_s = min(float(visit_s[stage][nodes].min()) for stage, nodes in enumerate(network.nodes_of) if stage)
    walks: Vector = away_s + home_s + (visits - 1) * float(apart.min()) + visits * least_s
    return walks


def _no_self_loops(hop_s: Matrix) -> Matrix:
    apart = hop_s.copy()
    np.fill_diagonal(apart, np.inf)
    return apart


@dataclass(frozen=True)
class Trips:
    """Least seconds of a microbatch of each origin: the whole round trip with its own tasks; from its forward's end to
    its loss; from its loss's end to its backward.
    """

    trip_s: Vector
    out_s: Vector
    home_s: Vector


def shortest_trips(network: Network, avoided: Mask | None = None) -> Trips:
    """Return the least times of each origin's microbatches on routes that no node in `avoided` is on but as their
    origin. A hop counts both ways at once: it is symmetric.
    """
    if avoided is None:
        avoided = np.zeros(len(network.problem.nodes), dtype=bool)
    own_s = network.work_s[0][network.origins] + network.loss_s[network.origins]
    return Trips(
        own_s + closed_walks_s(network, network.both_ways_s, network.work_s, avoided),
        closed_walks_s(network, network.one_way_s, network.forward_s, avoided),
        closed_walks_s(network, network.one_way_s.T, network.backward_s, avoided),
    )


@dataclass(frozen=True)
class Idle:
    """By class and node, seconds: no first task can start before `head_s`; after the node's last task the iteration
    goes on for at least `tail_s`. Infinite where no route leads.
    """

    head_s: Matrix
    tail_s: Matrix


def idle_ends(network: Network) -> Idle:
    """Return the least idle time of every node at the start and the end of an iteration.

    The head is the earliest arrival of any microbatch. The tail is the way of a gradient back to its origin or any
    gradient reduction on it, whichever takes longer.
    """
    automaton, nodes_of = network.automaton, network.nodes_of
    shape = (len(nodes_of), len(network.problem.nodes))
    head_s, tail_s = np.full(shape, np.inf), np.full(shape, np.inf)
    apart = _no_self_loops(network.one_way_s)
    heads: list[Vector] = [np.full(len(nodes_of[stage]), np.inf) for stage in automaton.stage]
    tails = [head.copy() for head in heads]
    heads[0][:], tails[0][:] = 0.0, network.reduce_s[0]
    for state, successors in enumerate(automaton.next_states):
        stage = automaton.stage[state]
        here = nodes_of[stage]
        tails[state] = np.maximum(tails[state], network.reduce_s[stage])
        head_s[stage, here] = np.minimum(head_s[stage, here], heads[state])
        tail_s[stage, here] = np.minimum(tail_s[stage, here], tails[state])
        ready_s = heads[state] + network.forward_s[stage][here]
        rest_s = tails[state] + network.backward_s[stage][here]
        for successor in successors:
            there = nodes_of[automaton.stage[successor]]
            hops_s, back_s = apart[np.ix_(here, there)], apart[np.ix_(there, here)]
            heads[successor] = np.minimum(heads[successor], (ready_s[:, None] + hops_s).min(axis=0))
            tails[successor] = np.minimum(tails[successor], (rest_s + back_s).min(axis=1))
    return Idle(head_s, tail_s)
