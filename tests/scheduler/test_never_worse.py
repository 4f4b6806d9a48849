"""A plan is never worse than the baselines beside it: what it is made of, and random clusters as a whole."""

import importlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import pytest
from test_build import WORKLOAD, build

from skippipe_scheduler.analysis.jitter import sample_iterations
from skippipe_scheduler.budget import Budget
from skippipe_scheduler.errors import ProblemError
from skippipe_scheduler.files import parse
from skippipe_scheduler.options import Robustness, SolveOptions
from skippipe_scheduler.plan.validate import validate
from skippipe_scheduler.problem.cluster import Cluster
from skippipe_scheduler.problem.costs import Costs
from skippipe_scheduler.problem.problem import Problem, StageNodes
from skippipe_scheduler.problem.rules import Rules
from skippipe_scheduler.search.constructed import promise_s
from skippipe_scheduler.search.local_search import LocalSearch
from skippipe_scheduler.search.portfolio import PortfolioSearch
from skippipe_scheduler.slots.placement import regional_placement
from skippipe_scheduler.slots.region_groups import grouped_placements, sizes_by_region
from skippipe_scheduler.slots.replica_order import order_replicas, ordered_replicas
from skippipe_scheduler.slots.routes import balanced_routes
from skippipe_scheduler.slots.slot_model import SlotModel
from skippipe_scheduler.solver.leave_stages_out import schedules_without_stages
from skippipe_scheduler.solver.plan_request import PlanRequest
from skippipe_scheduler.solver.planner import solve_with_baselines
from skippipe_scheduler.solver.solve import solve, solve_full_pipeline

FOLDER = Path(__file__).parents[2] / "benchmarks" / "scheduler"
NODE = {"compute_tflop_per_s": 1e3, "max_in_flight": 9}
QUICK = SolveOptions(max_evaluations=50)


@pytest.fixture
def random_clusters(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("random_clusters")


def regional(regions: int = 4, nodes: int = 4, **options: Any) -> Problem:
    """Return a problem of equal nodes whose regions lie a slow link apart; 4 stages, a quarter left out."""
    content = {
        "name": "regional",
        "nodes": [
            {
                "name": f"r{region}",
                "count": nodes,
                "region": f"r{region}",
                "compute_tflop_per_s": 1.0,
                "max_in_flight": 9,
            }
            for region in range(regions)
        ],
        "links": {
            "contention": "none",
            "within_region": {"latency_ms": 1, "gbit_per_s": 1000},
            "default": {"latency_ms": 5000, "gbit_per_s": 1000},
        },
    }
    return build(parse(Cluster, content, "test", ProblemError), **options)


@pytest.mark.parametrize("microbatches", [128, 256])
def test_a_line_of_uneven_stages_keeps_the_slowest_one_busy(microbatches: int) -> None:
    """Whatever has been found: no schedule ends before the slowest stage has run all microbatches."""
    nodes, forward_s = ("a", "b", "c", "d"), (0.024, 0.036, 0.036, 0.030)
    problem = Problem(
        nodes=nodes,
        stages=tuple(StageNodes(nodes=(node,)) for node in nodes),
        microbatches_per_origin=microbatches,
        costs=Costs(
            forward_s=dict(zip(nodes, forward_s, strict=True)),
            backward_s=dict(zip(nodes, (2 * taken_s for taken_s in forward_s), strict=True)),
            loss_s=dict.fromkeys(nodes, 0.0),
            transfer_s={node: {other: 0.0 for other in nodes if other != node} for node in nodes},
            memory=dict.fromkeys(nodes, 6),
        ),
        rules=Rules(num_stages=4, route_length=4, max_swaps=0),
    )
    plan = solve(problem, QUICK)
    assert plan.predicted.iteration_s < 1.02 * (3 * sum(forward_s) + (microbatches - 1) * 3 * max(forward_s))


def stages_of(problem: Problem, placement: Sequence[int]) -> list[set[str]]:
    """Return the regions of each stage's replicas."""
    assert problem.regions is not None
    regions = [problem.regions[rank] for rank in placement]
    ends = [sum(problem.sizes[: stage + 1]) for stage in range(problem.num_stages)]
    return [{*regions[end - size : end]} for size, end in zip(problem.sizes, ends, strict=True)]


def test_groups_are_pipelines_in_regions_down_to_stages_in_regions() -> None:
    problem = regional(stage_sizes=(4, 4, 4, 4))
    placements = [*grouped_placements(SlotModel(problem))]
    assert all(sorted(placement) == list(range(16)) for placement in placements)
    assert [len(stage) for stage in stages_of(problem, placements[0])] == [4, 4, 4, 4]
    assert [len(stage) for stage in stages_of(problem, placements[-1])] == [1, 1, 1, 1]


def test_a_ring_goes_through_each_region_once() -> None:
    problem = regional(regions=2, nodes=8, stage_sizes=(4, 4, 4, 4))
    slot_model = SlotModel(problem)
    placement = tuple(rank for stage in range(4) for rank in (2 * stage, 8 + 2 * stage, 2 * stage + 1, 9 + 2 * stage))
    ordered = order_replicas(slot_model, placement)
    for slots in slot_model.slots_of:
        around = [ordered[slot] // 8 for slot in (*slots, slots[0])]
        assert sum(here != there for here, there in pairwise(around)) == 2
        assert sorted(ordered[slot] for slot in slots) == sorted(placement[slot] for slot in slots)


def test_routes_follow_their_nodes_when_replicas_change_places() -> None:
    problem = regional(regions=2, nodes=8, stage_sizes=(4, 4, 4, 4))
    slot_model = SlotModel(problem)
    placement = tuple(rank for stage in range(4) for rank in (2 * stage, 8 + 2 * stage, 2 * stage + 1, 9 + 2 * stage))
    routes = balanced_routes(slot_model, 0)
    ordered, renamed = ordered_replicas(slot_model, placement, routes)
    assert ordered != placement
    nodes = [[placement[slot] for slot in route] for route in routes]
    assert [[ordered[slot] for slot in route] for route in renamed] == nodes


@pytest.mark.parametrize("skip_ratio", [0.25, 0.5])
def test_leaving_stages_out_is_no_slower_where_links_are_alike(skip_ratio: float) -> None:
    problem = regional(regions=1, nodes=8, skip_ratio=skip_ratio, stage_sizes=(2, 2, 2, 2))
    full = solve_full_pipeline(problem, QUICK)
    found = [*schedules_without_stages(full, problem, seed=0)]
    assert found
    for schedule in found:
        slot_model = SlotModel(problem)
        assert slot_model.covers(schedule.routes)
        assert LocalSearch(slot_model, 0).resume(schedule).iteration_s <= full.predicted.iteration_s


def test_no_schedule_of_a_full_pipeline_of_other_sizes() -> None:
    problem = regional(regions=1, nodes=8, stage_sizes=(3, 2, 2, 1))
    full = solve_full_pipeline(problem, QUICK)
    assert not [*schedules_without_stages(full, problem, seed=0)]


def test_stage_sizes_that_nobody_gives_may_be_even() -> None:
    """By the rule one region has two origins, no last stage, and sends its microbatches to another region."""
    by_rule = PlanRequest(regional(), QUICK, "rule", with_sizes=lambda sizes: regional(stage_sizes=sizes))
    assert regional().sizes == (5, 4, 4, 3)
    result = solve_with_baselines(by_rule)
    assert [len(stage.nodes) for stage in result.plan.stages] == [4, 4, 4, 4]
    assert result.plan.predicted.iteration_s <= result.full_pipeline.predicted.iteration_s
    assert result.problem.sizes == (4, 4, 4, 4)
    assert by_rule.difference_from(result.plan) is None


def test_why_a_plan_is_slower_is_said() -> None:
    slot_model = SlotModel(regional())
    given = regional(placement=slot_model.stages(regional_placement(slot_model)))
    result = solve_with_baselines(PlanRequest(given, QUICK))
    assert result.plan.predicted.iteration_s > result.full_pipeline.predicted.iteration_s
    assert "given" in result.why_slower


@pytest.mark.parametrize("seed", [1, 3, 4])
def test_random_clusters(random_clusters: ModuleType, seed: int) -> None:
    """That of seed 4 would be slower than the full pipeline without relays: links past its stages are slow."""
    small = random_clusters.Size(most_nodes=9, most_stages=5, most_microbatches=16)
    result = solve_with_baselines(random_clusters.random_request(seed, replace(QUICK, seed=seed), small))
    validate(result.plan)
    plan, full, blind = (p.predicted.iteration_s for p in (result.plan, result.full_pipeline, result.network_blind))
    assert plan <= blind
    assert plan <= full
    assert not result.why_slower
    assert any(microbatch.relays for microbatch in result.plan.microbatches) == (seed == 4)


def test_judged_under_jitter_a_plan_is_no_worse_than_blind_skipping(random_clusters: ModuleType) -> None:
    jitter = Robustness(sigma=0.5, samples=4)
    for seed in range(4):
        options = SolveOptions(max_evaluations=3, robustness=jitter)
        result = solve_with_baselines(random_clusters.random_request(seed, options, random_clusters.Size(12, 6, 20)))
        mean_s = [
            fmean(sample_iterations(plan, jitter.samples, jitter_sigma=jitter.sigma))
            for plan in (result.plan, result.network_blind)
        ]
        assert mean_s[0] <= mean_s[1]
        assert not result.why_slower or "jitter" in result.why_slower


def test_sizes_of_even_stages() -> None:
    assert regional(nodes=3, stage_sizes="even").sizes == (3, 3, 3, 3)
    assert regional(regions=2, nodes=5, stage_sizes="even").sizes == (3, 3, 2, 2)
    slot_model = SlotModel(regional())
    with pytest.raises(ProblemError, match="leave stage_sizes: even out"):
        regional(stage_sizes="even", placement=slot_model.stages(regional_placement(slot_model)))


def uneven(counts: Sequence[int] = (5, 3, 4), **options: Any) -> Problem:
    """Return a problem of three regions with so many nodes, those of the second twice as fast.

    The gradients of a stage take 160 s or more from region to region.
    """
    nodes = [
        {"name": f"r{region}", "count": count, "region": f"r{region}", "compute_tflop_per_s": speed, "max_in_flight": 9}
        for region, (count, speed) in enumerate(zip(counts, (1.0, 2.0, 1.0), strict=True))
    ]
    links = {
        "contention": "none",
        "within_region": {"latency_ms": 1, "gbit_per_s": 1000},
        "default": {"latency_ms": 1, "gbit_per_s": 0.1},
    }
    cluster = parse(Cluster, {"name": "uneven", "nodes": nodes, "links": links}, "test", ProblemError)
    return build(cluster, replace(WORKLOAD, layer_gradient_bytes=10**9), **options)


def test_sizes_by_region_keep_each_stage_in_one() -> None:
    """The work divides into 1.3, 1.6 and 1.1 of 4 stages, so the fast region gets two."""
    choices = sizes_by_region(uneven(), most=9)
    assert len(choices) == 6  # from three regions on, either way
    for sizes in choices:
        assert sorted(sizes) == [1, 2, 4, 5]
        problem = uneven(stage_sizes=sizes)
        *_, placement = grouped_placements(SlotModel(problem))
        assert [len(stage) for stage in stages_of(problem, placement)] == [1, 1, 1, 1]


def test_small_stages_lie_where_nodes_are_fast() -> None:
    for sizes in sizes_by_region(uneven((4, 4, 4)), most=9):
        assert sorted(sizes) == [2, 2, 4, 4]
        problem = uneven((4, 4, 4), stage_sizes=sizes)
        *_, placement = grouped_placements(SlotModel(problem))
        assert [stage == {"r1"} for stage in stages_of(problem, placement)] == [size == 2 for size in sizes]


def test_where_nodes_hold_few_microbatches_a_region_comes_late() -> None:
    """Early stages hold them longest."""
    content = uneven().model_dump()
    content["costs"]["memory"] |= {node: 1 for node in content["nodes"] if node.startswith("r2")}
    first, *_, last = sizes_by_region(Problem.model_validate(content), most=6)
    assert first[-1] == 4
    assert last[0] == 4


def test_no_sizes_by_region_with_one_region_or_more_than_stages() -> None:
    assert sizes_by_region(regional(regions=1, nodes=8), most=4) == []
    assert sizes_by_region(regional(regions=6, nodes=2), most=4) == []


def test_stages_in_regions_come_first_where_reductions_between_them_are_slow() -> None:
    """Where there is time for few sizes, the others are not searched."""
    request = PlanRequest(uneven(), QUICK, "rule", with_sizes=lambda sizes: uneven(stage_sizes=sizes))
    even, *by_region = [SlotModel(problem) for problem in request.beside(None)]
    assert promise_s(by_region[0]) < 0.01 * promise_s(even)
    portfolio = PortfolioSearch([even], Budget(0.1), seed=0, num_workers=1, beside=by_region)
    found = portfolio.run()
    assert found.slot_model in by_region
    assert portfolio.slot_models[0] is by_region[0]


def test_stages_do_not_reduce_between_regions_where_that_is_slow() -> None:
    """Neither those of the plan nor those of the full pipeline beside it."""
    request = PlanRequest(uneven(), QUICK, "rule", with_sizes=lambda sizes: uneven(stage_sizes=sizes))
    result = solve_with_baselines(request)
    for plan in (result.plan, result.full_pipeline):
        assert plan.regions is not None
        region_of = dict(zip(plan.nodes, plan.regions, strict=True))
        assert [len({region_of[node] for node in stage.nodes}) for stage in plan.stages] == [1, 1, 1, 1]
    assert request.resolve(result.plan).sizes == tuple(len(stage.nodes) for stage in result.plan.stages)
    assert request.difference_from(result.plan) is None
