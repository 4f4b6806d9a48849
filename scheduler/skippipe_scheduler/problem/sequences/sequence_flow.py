"""Sequences with even coverage, however many legal ones there are: a flow through (stage, length) pairs."""

from collections import Counter, defaultdict
from typing import Any

from ortools.sat.python import cp_model

from skippipe_scheduler.errors import SkipPipeError
from skippipe_scheduler.problem.rules import Rules
from skippipe_scheduler.problem.sequences.dealt_sequences import deal_sequences

_Point = tuple[int, int]
"""A stage, and the number of stages visited with it."""
_Flows = dict[_Point, dict[_Point, Any]]
"""How many microbatches go from point to point."""
_END = -1
"""What stands for the stage after the last one."""
_EFFORT = 30
"""Units of CP-SAT's deterministic time, about seconds. Chosen: 50 stages need less."""
_MOST_EDGES = 10_000
"""Edges of the flow up to which it comes before the deal. Measured: 0.5 s with 25 stages and jumps over all."""


def even_sequences(rules: Rules, total: int, seed: int) -> list[tuple[int, ...]]:
    """Return an ascending sequence per microbatch of `total`, the stages visited as evenly as `rules` ask for.

    Integers on the edges say how many microbatches go that way; any such flow can be read as whole sequences. Large
    problems are dealt where that comes out. Raises `SkipPipeError` where none is found: there is none
    (`skippipe_scheduler.problem.infeasibility` tells), or the search was too long, which may happen beyond about 50
    stages.
    """
    dealt = deal_sequences(rules, total, seed) if len(_edges(rules)) > _MOST_EDGES else None
    if dealt is not None:
        return dealt
    model, flows = _flow(rules, total)
    solver, status = _solved(model, seed)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        raise SkipPipeError(
            f"found no {total} routes that visit {rules.num_stages} stages evenly; "
            "use fewer stages or set uniform_coverage to false"
        )
    left = {point: Counter({to: solver.value(flow) for to, flow in flows[point].items()}) for point in flows}
    return [_take_one(left) for _ in range(total)]


def may_cover(rules: Rules, total: int) -> bool:
    """Return False where it is proved that no `total` sequences visit the stages as evenly as `rules` ask for."""
    if deal_sequences(rules, total, seed=0) is not None:
        return True
    model, _ = _flow(rules, total)
    return bool(_solved(model, seed=0)[1] != cp_model.INFEASIBLE)


def _flow(rules: Rules, total: int) -> tuple[cp_model.CpModel, _Flows]:
    model = cp_model.CpModel()
    flows: _Flows = defaultdict(dict)
    entering: dict[_Point, list[Any]] = defaultdict(list)
    for source, sink in _edges(rules):
        flows[source][sink] = model.new_int_var(0, total, "")
        entering[sink].append(flows[source][sink])
    counts = rules.length_counts(total)
    for point in [(0, 1), *entering]:
        end = model.new_int_var(0, counts.get(point[1], 0), "")
        arrived = sum(entering[point]) if point in entering else total
        model.add(sum(flows[point].values()) + end == arrived)
        flows[point][_END, point[1]] = end
    for length, count in counts.items():
        model.add(sum(leaving.get((_END, length), 0) for leaving in flows.values()) == count)
    for stage, bounds in rules.limits(total).items():
        visits = sum(flow for point, arriving in entering.items() if point[0] == stage for flow in arriving)
        model.add_linear_constraint(visits, *bounds)
    return model, flows


def _solved(model: cp_model.CpModel, seed: int) -> tuple[cp_model.CpSolver, Any]:
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = seed % 2**31
    solver.parameters.catch_sigint_signal = False
    solver.parameters.max_deterministic_time = _EFFORT
    solver.parameters.cp_model_presolve = False  # it aborts on some of these models (OR-tools 9.15)
    return solver, solver.solve(model)


def _edges(rules: Rules) -> list[tuple[_Point, _Point]]:
    return [
        ((stage, length), (following, length + 1))
        for length in range(1, rules.route_length)
        for stage in (range(length - 1, rules.num_stages) if length > 1 else (0,))
        for following in range(stage + 1, min(rules.num_stages, stage + rules.max_forward_jump + 1))
    ]


def _take_one(left: dict[_Point, Counter[_Point]]) -> tuple[int, ...]:
    """Take one microbatch out of the flow that is left and return its stages."""
    sequence, point = [], (0, 1)
    while point[0] != _END:
        sequence.append(point[0])
        following = next(successor for successor, flow in left[point].items() if flow > 0)
        left[point][following] -= 1
        point = following
    return tuple(sequence)
