"""The pass that splits backwards: never longer, within memory, as short as closed forms and bounds say."""

import json
import random

import pytest
from hypothesis import given, settings, strategies as st
from independent_checker import first_offence_of
from random_plans import random_plan
from small_problems import problems, share_links

from skippipe_scheduler.baselines.dispatch import dispatch
from skippipe_scheduler.budget import Budget
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.validate import validate
from skippipe_scheduler.problem.costs import Costs
from skippipe_scheduler.problem.problem import Problem, StageNodes
from skippipe_scheduler.problem.rules import Rules
from skippipe_scheduler.problem.sharing.contention import Contention
from skippipe_scheduler.solver.solve import SolveOptions, solve, solve_network_blind
from skippipe_scheduler.solver.split_backward import SplitSearch, plan_weight_gradients, split_bound_s


def line(num_nodes: int, num_microbatches: int, *, memory: int = 99, transfer_s: float = 0.0) -> Problem:
    """Return a full pipeline: forward 1 s, backward 2 s, half of it weight gradients."""
    nodes = tuple(f"node-{index}" for index in range(num_nodes))
    return Problem(
        nodes=nodes,
        stages=tuple(StageNodes(nodes=(node,)) for node in nodes),
        microbatches_per_origin=num_microbatches,
        costs=Costs(
            forward_s=dict.fromkeys(nodes, 1.0),
            backward_s=dict.fromkeys(nodes, 2.0),
            weight_s=dict.fromkeys(nodes, 1.0),
            loss_s=dict.fromkeys(nodes, 0.0),
            transfer_s={source: {sink: transfer_s for sink in nodes if sink != source} for source in nodes},
            memory=dict.fromkeys(nodes, memory),
            reduce_s=(0.0,) * num_nodes,
        ),
        rules=Rules(num_stages=num_nodes, route_length=num_nodes, max_swaps=0, max_swap_distance=0),
    )


def one_forward_one_backward(problem: Problem) -> Plan:
    count = problem.num_stages
    plan = dispatch(problem, tuple(range(count)), [tuple(range(count))] * 8, "one_forward_one_backward")
    assert plan.predicted.iteration_s == 37.0
    return plan


def with_weights(problem: Problem, share: float) -> Problem:
    weight_s = {node: share * taken_s for node, taken_s in problem.costs.backward_s.items()}
    return problem.model_copy(update={"costs": problem.costs.model_copy(update={"weight_s": weight_s})})


def test_a_line_is_filled_to_its_bound() -> None:
    problem = line(4, 8)
    plan = plan_weight_gradients(one_forward_one_backward(problem), problem, Budget(60.0, 15_000), 0)
    validate(plan)
    # Work of a node, and the way there (3 forwards) that nothing can fill: reached.
    assert split_bound_s(problem) == pytest.approx(8 * 3 + 3)
    assert plan.predicted.iteration_s == pytest.approx(27.0)


def test_gaps_alone_are_filled_without_a_search() -> None:
    problem = line(4, 8)
    plan = plan_weight_gradients(one_forward_one_backward(problem), problem, Budget(60.0, 1), 0)
    validate(plan)
    assert plan.predicted.iteration_s == pytest.approx(29.0)


def test_memory_limits_what_is_put_off() -> None:
    roomy, tight = line(4, 8), line(4, 8, memory=2)
    plans = [solve(problem, SolveOptions(max_evaluations=4_000)) for problem in (roomy, tight)]
    for plan in plans:
        validate(plan)
    assert plans[0].predicted.iteration_s < plans[1].predicted.iteration_s
    whole = tight.model_copy(update={"costs": tight.costs.model_copy(update={"weight_s": None})})
    assert plans[1].predicted.iteration_s <= solve(whole, SolveOptions(max_evaluations=4_000)).predicted.iteration_s


def test_same_seed_and_budget_give_the_same_plan() -> None:
    problem = line(3, 4, transfer_s=0.5)
    plans = [solve(problem, SolveOptions(seed=3, max_evaluations=5_000)) for _ in range(2)]
    assert plans[0] == plans[1]
    assert any(plans[0].split_of.values())


@settings(max_examples=8)
@given(st.integers(0, 10_000), st.sampled_from(["none", "link", "node"]), st.integers(1, 3))
def test_never_longer_and_always_valid(seed: int, contention: Contention, memory: int) -> None:
    plan = random_plan(seed, contention=contention, memory=memory)
    weight_s = {node: 0.4 * taken_s for node, taken_s in plan.costs.backward_s.items()}
    plan = plan.model_copy(update={"costs": plan.costs.model_copy(update={"weight_s": weight_s})})
    order, timeline = SplitSearch(plan, Budget(60.0, 500), random.Random(seed)).run()
    assert timeline.iteration_s <= plan.predicted.iteration_s
    predicted = plan.predicted.model_copy(
        update={name: getattr(timeline, name) for name in ("iteration_s", "pipeline_s", "reduce_exposed_s")}
    )
    split = plan.model_copy(update={"order": dict(order), "predicted": predicted})
    validate(split)
    assert first_offence_of(json.loads(split.to_json())) is None


@settings(max_examples=4)
@given(problems(), st.sampled_from(["none", "link"]), st.integers(0, 3), st.floats(0.1, 0.9))
def test_plans_of_the_planner_are_valid_and_above_the_bound(
    problem: Problem, contention: Contention, seed: int, share: float
) -> None:
    posed = with_weights(share_links(problem, contention), share)
    plan = solve(posed, SolveOptions(seed=seed, max_evaluations=100))
    validate(plan)
    assert plan.costs.weight_s is not None
    assert split_bound_s(posed) <= plan.predicted.iteration_s * (1 + 1e-9)
    blind = solve_network_blind(posed, SolveOptions(seed=seed, max_evaluations=50))
    validate(blind)


def test_plans_without_weights_have_none() -> None:
    problem = line(3, 4)
    whole = problem.model_copy(update={"costs": problem.costs.model_copy(update={"weight_s": None})})
    assert "weight_s" not in solve(whole, SolveOptions(max_evaluations=200)).to_json()
