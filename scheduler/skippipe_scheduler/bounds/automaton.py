"""The legal sequences of stages as a graph: however many sequences there are, few states tell how one can go on."""

from dataclasses import dataclass
from typing import NamedTuple

from skippipe_scheduler.problem.rules import Rules

MOST_STATES = 20_000
"""States up to which the automaton is built; beyond, bounds only count stages. Chosen: some tenths of a second."""


@dataclass(frozen=True)
class Automaton:
    """States numbered so that every edge leads to a higher number; every state lies on some legal sequence."""

    stage: tuple[int, ...]
    """Stage visited last; state 0 is the origin."""
    length: tuple[int, ...]
    """Stages visited so far."""
    accepts: tuple[bool, ...]
    """Whether a sequence may end here."""
    next_states: tuple[tuple[int, ...], ...]


class _State(NamedTuple):
    """All that decides how a sequence can go on; `late` holds the stages below the frontier that may still be visited,
    ascending.
    """

    stage: int
    length: int
    swaps: int
    frontier: int
    late: tuple[int, ...]


def legal_sequences(rules: Rules) -> Automaton | None:
    """Return the automaton that accepts the legal sequences, or None where it has more than `MOST_STATES` states."""
    layer = {_State(0, 1, 0, 0, ()): 0}
    states = list(layer)
    edges: list[list[int]] = []
    for length in range(1, rules.route_length + 1):
        following: dict[_State, int] = {}
        for state in layer:
            reached = _successors(state, rules) if length < rules.route_length else []
            for successor in reached:
                following.setdefault(successor, len(states) + len(following))
            if len(states) + len(following) > MOST_STATES:
                return None
            edges.append([following[successor] for successor in reached])
        states += following
        layer = following
    return _without_dead_ends(states, edges, rules)


def any_sequence(rules: Rules) -> Automaton:
    """Return an automaton that only counts stages: "stage" 0 is the origin and 1 any other."""
    longest = rules.route_length
    return Automaton(
        stage=(0, *(1,) * (longest - 1)),
        length=tuple(range(1, longest + 1)),
        accepts=tuple(length in rules.lengths for length in range(1, longest + 1)),
        next_states=(*((state + 1,) for state in range(longest - 1)), ()),
    )


def _successors(state: _State, rules: Rules) -> list[_State]:
    choices = [(stage, state.swaps + 1) for stage in state.late]
    furthest = min(rules.num_stages - 1, state.frontier + rules.max_forward_jump)
    choices += [(stage, state.swaps) for stage in range(state.frontier + 1, furthest + 1)]
    reached = (_visit(state, stage, swaps, rules) for stage, swaps in choices)
    return [successor for successor in reached if successor is not None]


def _visit(state: _State, stage: int, swaps: int, rules: Rules) -> _State | None:
    """Return the state after a visit, or None where a protected stage can be visited no more."""
    frontier = max(state.frontier, stage)
    late = [lower for lower in (*state.late, *range(state.frontier + 1, stage)) if lower != stage]
    nearest = frontier - rules.max_swap_distance if swaps < rules.max_swaps else frontier
    if any(lower < nearest and lower in rules.protected_stages for lower in late):
        return None
    return _State(stage, state.length + 1, swaps, frontier, tuple(lower for lower in late if lower >= nearest))


def _accepts(state: _State, rules: Rules) -> bool:
    protected = rules.protected_stages
    all_visited = not protected or (
        protected[-1] <= state.frontier and not any(stage in protected for stage in state.late)
    )
    return state.length in rules.lengths and all_visited


def _without_dead_ends(states: list[_State], edges: list[list[int]], rules: Rules) -> Automaton:
    accepts = [_accepts(state, rules) for state in states]
    alive = list(accepts)
    for index in reversed(range(len(states))):
        alive[index] = alive[index] or any(alive[successor] for successor in edges[index])
    kept = [index for index, living in enumerate(alive) if living or index == 0]
    number = {index: position for position, index in enumerate(kept)}
    return Automaton(
        stage=tuple(states[index].stage for index in kept),
        length=tuple(states[index].length for index in kept),
        accepts=tuple(accepts[index] for index in kept),
        next_states=tuple(
            tuple(number[successor] for successor in edges[index] if successor in number) for index in kept
        ),
    )
