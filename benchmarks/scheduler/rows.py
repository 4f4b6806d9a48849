"""The rows of the benchmark table: what is solved, for how long, and the bar that it has to meet."""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from case import OVERTIME_S, Bar, Case, Measured, Row, gap, of_plan, peak_memory_gib, timed
from cluster_rows import CLUSTER_ROWS
from instances import LARGE, LARGE_QUICK, Shape, origins_free, placement_free, synthetic_problem

from skippipe_scheduler.baselines.dispatch import best_dispatch, slots_of_plan
from skippipe_scheduler.baselines.full_and_blind import full_pipeline_problem
from skippipe_scheduler.baselines.paper_method import solve_paper_method
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.validate import load_plan
from skippipe_scheduler.problem.problem import Problem, write_problem
from skippipe_scheduler.problem.stage_sizes import size_variants
from skippipe_scheduler.solver.other_routes import other_routes_request, route_distance
from skippipe_scheduler.solver.planner import solve_request
from skippipe_scheduler.solver.replan import replan, without_node
from skippipe_scheduler.solver.solve import (
    SolveOptions,
    solve,
    solve_full_pipeline,
    solve_network_blind,
    solve_variants,
)

QUICK_S = 4.0
"""Longest time limit of a quick run."""
MEDIUM = Shape(num_nodes=20, num_stages=6, route_length=4, num_microbatches=30)
WIDE = Shape(num_nodes=128, num_stages=16, route_length=12, num_microbatches=512)
_BLIND_SEEDS = 5
_DRAWS = 7


def solved(case: Case, name: str, bar: Bar, prepare: Callable[[Problem], Problem] | None = None) -> Measured:
    """Solve one instance, changed by `prepare`."""
    problem = case.load(name, prepare)
    plan, wall_s = timed(lambda: solve(problem, case.options()))
    return replace(of_plan(plan, wall_s), met=bar.met_by(plan), note=gap(plan))


def solved_origins_free(case: Case) -> Measured:
    """Leave the placement and the microbatches of each origin to the planner, and say how it splits them."""
    problem = origins_free(placement_free(case.load("reference-20-nodes")))
    plan, wall_s = timed(lambda: solve(problem, case.options()))
    starts = [sum(microbatch.route[0] == origin for microbatch in plan.microbatches) for origin in plan.stages[0].nodes]
    return replace(of_plan(plan, wall_s), note=f"{gap(plan)}; origins start {sorted(starts, reverse=True)}")


def large(case: Case) -> Measured:
    """Solve the synthetic instance with a free placement, against the best dispatch rule on the plan's own routes."""
    problem = _large_problem(case)
    plan, wall_s = timed(lambda: solve(problem, case.options()))
    peak_gib = peak_memory_gib()
    dispatched, dispatch_wall_s = timed(lambda: best_dispatch(problem, *slots_of_plan(plan)))
    gain = 1 - plan.predicted.iteration_s / dispatched.predicted.iteration_s
    met = wall_s <= case.time_limit_s and peak_gib <= 8 and gain >= 0.15
    note = (
        f"{gain:.0%} better than {dispatched.solver.name} ({dispatched.predicted.iteration_s:.1f} s, "
        f"found in {dispatch_wall_s:.0f} s); {gap(plan)}"
    )
    return replace(of_plan(plan, wall_s), peak_gib=peak_gib, met=met, note=note)


def large_longer(case: Case) -> Measured:
    """Solve the synthetic instance with a fifth of the time, then with all of it."""
    problem, options = _large_problem(case), case.options()
    short, _ = timed(lambda: solve(problem, replace(options, time_limit_s=case.time_limit_s / 5)))
    plan, wall_s = timed(lambda: solve(problem, options))
    gain = 1 - plan.predicted.iteration_s / short.predicted.iteration_s
    note = f"{gain:.1%} better than {short.predicted.iteration_s:.1f} s in {case.time_limit_s / 5:g} s; {gap(plan)}"
    return replace(of_plan(plan, wall_s), met=gain > 0, note=note)


def _large_problem(case: Case) -> Problem:
    return synthetic_problem(LARGE_QUICK if case.quick else LARGE, seed=0)


def full_against_skip(case: Case) -> Measured:
    """Divide the full pipeline's iteration by that of skipping, each with its own best placement.

    The planner chooses sizes of stages and how many microbatches an origin starts, for both in the same way.
    """
    problem = origins_free(placement_free(case.load("reference-20-nodes")))
    full_problem = full_pipeline_problem(problem)[0]
    skip, skip_wall_s = timed(lambda: solve_variants(size_variants(problem), case.options()))
    full, full_wall_s = timed(lambda: solve_variants(size_variants(full_problem), case.options()))
    measured = _times(problem, skip, full, skip_wall_s + full_wall_s)
    return replace(measured, met=measured.value >= 2.2)


def full_against_skip_as_posed(case: Case) -> Measured:
    """Do the same with the sizes and numbers of microbatches that the instance has; the full pipeline's sizes even."""
    problem = placement_free(case.load("reference-20-nodes"))
    skip, skip_wall_s = timed(lambda: solve(problem, case.options()))
    full, full_wall_s = timed(lambda: solve_full_pipeline(problem, case.options()))
    return _times(problem, skip, full, skip_wall_s + full_wall_s)


def _times(problem: Problem, skip: Plan, full: Plan, wall_s: float) -> Measured:
    times = full.predicted.iteration_s / skip.predicted.iteration_s
    alone = problem.num_stages / problem.rules.route_length
    note = (
        f"full pipeline {full.predicted.iteration_s:.2f} s, skipping {skip.predicted.iteration_s:.2f} s; less work "
        f"alone (route length / stages = {1 / alone:.2f}) would give {alone:.2f} times, the rest {times / alone:.2f}; "
        f"replicas {_replicas(full)} and {_replicas(skip)}"
    )
    return Measured(times, "times", wall_s=wall_s, note=note)


def _replicas(plan: Plan) -> str:
    return "-".join(str(len(stage.nodes)) for stage in plan.stages)


def network_blind(case: Case) -> Measured:
    """Choose routes as if all links and nodes were alike, on the published placement; the median of five seeds."""
    problem = case.load("reference-20-nodes")
    found = []
    for seed in range(case.seed, case.seed + _BLIND_SEEDS):
        options = SolveOptions(time_limit_s=case.time_limit_s / _BLIND_SEEDS, seed=seed)
        found.append(timed(partial(solve_network_blind, problem, options)))
    found.sort(key=lambda pair: pair[0].predicted.iteration_s)
    plan = found[_BLIND_SEEDS // 2][0]
    all_s = ", ".join(f"{result.predicted.iteration_s:.1f}" for result, _ in found)
    return replace(of_plan(plan, sum(wall_s for _, wall_s in found)), note=f"median of seeds: {all_s} s")


def paper_method(case: Case, name: str, prepare: Callable[[Problem], Problem] | None = None) -> Measured:
    """Solve one instance by the SkipPipe paper's own method."""
    problem = case.load(name, prepare)
    plan, wall_s = timed(lambda: solve_paper_method(problem, case.time_limit_s, case.seed))
    return Measured(plan.predicted.iteration_s, wall_s=wall_s)


def replanned(case: Case, stage: int) -> Measured:
    """Lose one node of `stage`, re-plan within 5 s, and compare with a fresh solve of what is left."""
    problem = case.load("regions-64-nodes")
    before = solve(problem, case.options())
    replicas = before.stages[stage].nodes
    left = without_node(problem, before, replicas[case.seed % len(replicas)])
    limit_s = min(4.5, case.time_limit_s)
    plan, wall_s = timed(lambda: replan(before, left, replace(case.options(), time_limit_s=limit_s)))
    fresh, _ = timed(lambda: solve(left, case.options()))
    above = plan.predicted.iteration_s / fresh.predicted.iteration_s - 1
    note = f"fresh solve in {case.time_limit_s:g} s: {fresh.predicted.iteration_s:.2f} s; {above:+.1%}"
    return replace(of_plan(plan, wall_s), met=wall_s <= 5 and above <= 0.10, note=note)


def swaps_against_none(case: Case, name: str, prepare: Callable[[Problem], Problem] | None = None) -> Measured:
    """Divide the iteration of routes in order by that of routes with at most one swap."""
    problem = case.load(name, prepare)
    found = []
    for max_swaps in (0, 1, 2):
        rules = problem.rules.model_copy(update={"max_swaps": max_swaps})
        found.append(timed(partial(solve, problem.model_copy(update={"rules": rules}), case.options())))
    none_s, one_s, two_s = (plan.predicted.iteration_s for plan, _ in found)
    note = f"no swap {none_s:.2f} s, one {one_s:.2f} s, two {two_s:.2f} s"
    return Measured(none_s / one_s, "times", wall_s=sum(wall_s for _, wall_s in found), note=note)


def redrawn_routes(case: Case, name: str) -> Measured:
    """Draw further plans on the placement of a first one, as `recipe.redrawn_routes` does; how much slower they are."""
    first, first_wall_s = timed(lambda: solve(case.load(name), case.options()))
    each_s = case.time_limit_s / _DRAWS
    requests = [
        other_routes_request(first, first.rules, SolveOptions(time_limit_s=each_s, seed=seed))
        for seed in range(case.seed + 1, case.seed + 1 + _DRAWS)
    ]
    draws = [timed(partial(solve_request, request)) for request in requests]
    mean_s = statistics.fmean(plan.predicted.iteration_s for plan, _ in draws)
    others = statistics.fmean(route_distance(first, plan) for plan, _ in draws)
    note = f"first {first.predicted.iteration_s:.2f} s, draws {mean_s:.2f} s; {others:.0%} of their routes are others"
    wall_s = first_wall_s + sum(wall_s for _, wall_s in draws)
    return Measured(mean_s / first.predicted.iteration_s, "times", wall_s=wall_s, note=note)


def first_plan(case: Case, shape: Shape) -> Measured:
    """Run `skippipe plan` with little time, as a user does; what counts is how long the whole command takes."""
    with tempfile.TemporaryDirectory() as folder:
        problem, out = Path(folder) / "problem.json", Path(folder) / "plan.json"
        write_problem(synthetic_problem(shape, case.seed), problem)
        command = [sys.executable, "-m", "skippipe", "plan", "--problem", str(problem), "--out", str(out)]
        command += ["--time-limit", f"{case.time_limit_s:g}", "--seed", f"{case.seed}"]
        begin_s = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wall_s = time.perf_counter() - begin_s
        plan = load_plan(out)
    met = wall_s <= case.time_limit_s + OVERTIME_S
    return replace(of_plan(plan, wall_s), met=met, note="with both baselines")


def _solve_row(
    title: str, file: str, time_limit_s: float, bar: Bar, prepare: Callable[[Problem], Problem] | None = None
) -> Row:
    name = f"{title} {time_limit_s:g} s"
    return Row(name, time_limit_s, str(bar), partial(solved, name=file, bar=bar, prepare=prepare))


def _swaps_row(title: str, file: str, prepare: Callable[[Problem], Problem] | None = None) -> Row:
    measure = partial(swaps_against_none, name=file, prepare=prepare)
    return Row(f"swaps against none, {title} 30 s", 30, "", measure)


def _first_plan_row(limit_s: float, shape: Shape) -> Row:
    bar = f"≤ {limit_s + OVERTIME_S:g} s of wall time"
    return Row(f"first plan, {shape.num_nodes:,} nodes {limit_s:g} s", limit_s, bar, partial(first_plan, shape=shape))


_TWENTY = "reference-20-nodes"
_LARGE_BAR = "valid in time, ≤ 8 GiB, ≥ 15% better than dispatch"
_REPLAN_BAR = "≤ 5 s of wall time, ≤ 10% above a fresh solve"
ROWS: Mapping[str, Row] = {
    row.name: row
    for row in (
        _solve_row("reference-20 published placement", _TWENTY, 30, Bar(at_most_s=33.6)),
        _solve_row("reference-20 published placement", _TWENTY, 120, Bar(at_most_s=33.2, bound_at_least_s=31)),
        _solve_row("reference-20 placement free", _TWENTY, 60, Bar(at_most_s=28.3), placement_free),
        _solve_row(
            "reference-20 placement free", _TWENTY, 300, Bar(at_most_s=27.3, bound_at_least_s=22), placement_free
        ),
        Row("reference-20 placement and origins free 60 s", 60, "", solved_origins_free),
        Row("reference-20 placement and origins free 300 s", 300, "", solved_origins_free),
        _solve_row("regions-18", "regions-18-nodes", 30, Bar(at_most_s=22.8)),
        _solve_row("regions-18", "regions-18-nodes", 300, Bar(gap_at_most=0.08)),
        _solve_row("regions-64", "regions-64-nodes", 60, Bar(at_most_s=81)),
        Row("1,000 nodes 120 s", 120, _LARGE_BAR, large),
        Row("1,000 nodes 600 s", 600, "better than in 120 s", large_longer),
        Row("full pipeline against 33% skip 60 s", 60, "≥ 2.2 times", full_against_skip),
        Row("full pipeline against 33% skip, sizes and origins as posed 60 s", 60, "", full_against_skip_as_posed),
        _swaps_row("reference-20 published placement", _TWENTY),
        _swaps_row("reference-20 placement free", _TWENTY, placement_free),
        _swaps_row("regions-18", "regions-18-nodes"),
        _swaps_row("regions-64", "regions-64-nodes"),
        Row("redrawn routes, reference-20 published placement 60 s", 60, "", partial(redrawn_routes, name=_TWENTY)),
        Row("redrawn routes, regions-64 60 s", 60, "", partial(redrawn_routes, name="regions-64-nodes")),
        Row("network-blind reference-20 60 s", 60, "", network_blind),
        Row("paper method reference-20 published placement 60 s", 60, "", partial(paper_method, name=_TWENTY)),
        Row(
            "paper method reference-20 placement free 60 s",
            60,
            "",
            partial(paper_method, name=_TWENTY, prepare=placement_free),
        ),
        Row("re-planning, origin lost 60 s", 60, _REPLAN_BAR, partial(replanned, stage=0)),
        Row("re-planning, other node lost 60 s", 60, _REPLAN_BAR, partial(replanned, stage=3)),
        _first_plan_row(1, MEDIUM),
        _first_plan_row(5, WIDE),
        _first_plan_row(30, LARGE),
        *CLUSTER_ROWS,
    )
}
