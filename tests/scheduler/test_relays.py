"""Plans whose messages go by way of nodes of the stages that a route leaves out."""

import json
from collections.abc import Collection

import pytest
from hypothesis import given, settings, strategies as st
from independent_checker import first_offence_of
from random_plans import random_plan

from skippipe_scheduler.analysis.critical_path import critical_path
from skippipe_scheduler.analysis.explain import bottleneck
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.recost import at_pace
from skippipe_scheduler.plan.simulate import simulate
from skippipe_scheduler.plan.validate import validate
from skippipe_scheduler.problem.sharing.contention import Contention
from skippipe_scheduler.solver.relays import with_relays

CONTENTIONS = st.sampled_from(["none", "link", "node", "shared"])


def full_and_short(seed: int, contention: Contention = "none", split: float = 0.0) -> tuple[Plan, Plan]:
    """Return a plan whose routes visit all four stages in order, and one of the same nodes whose routes visit three."""
    shape = {"num_microbatches": 6, "swaps": 0, "contention": contention}
    full = random_plan(seed, num_nodes=7, route_length=4, split=split, **shape)  # type: ignore[arg-type]
    return full, random_plan(seed, beside=full, **shape)  # type: ignore[arg-type]


def kept_stages(plan: Plan) -> list[Collection[int]]:
    return [{plan.stage_of[node] for node in microbatch.route} for microbatch in plan.microbatches]


@given(st.integers(0, 10_000), CONTENTIONS, st.sampled_from([0.0, 0.5]))
@settings(max_examples=40)
def test_a_fuller_plan_relays_what_is_left_out(seed: int, contention: Contention, split: float) -> None:
    full, short = full_and_short(seed, contention, split)
    kept = kept_stages(short)
    found = with_relays(full, kept, short.rules)
    validate(found)
    assert first_offence_of(json.loads(found.to_json())) is None
    assert (found.rules, found.visits, found.stages, found.costs) == (
        short.rules,
        short.visits,
        full.stages,
        full.costs,
    )
    for whole, microbatch, stages in zip(full.microbatches, found.microbatches, kept, strict=True):
        assert microbatch.path == whole.route
        assert microbatch.route == tuple(node for node in whole.route if full.stage_of[node] in stages)
    assert found.predicted.iteration_s == simulate(found).iteration_s
    assert found.predicted.lower_bound_s == 0


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.5]))
@settings(max_examples=20)
def test_relays_stand_where_their_tasks_stood_and_have_no_weight_gradient(seed: int, split: float) -> None:
    full, short = full_and_short(seed, split=split)
    found = with_relays(full, kept_stages(short), short.rules)
    relays = {(node, microbatch.id) for microbatch in found.microbatches for node in microbatch.relays}
    assert relays
    for node, tasks in full.order.items():
        expected = [
            (f"R{operation}" if (node, microbatch) in relays else operation, microbatch)
            for operation, microbatch in tasks
            if operation != "W" or (node, microbatch) not in relays
        ]
        assert list(found.order[node]) == expected


@given(st.integers(0, 10_000), CONTENTIONS)
@settings(max_examples=20)
def test_nothing_is_busier_or_fuller_than_in_the_fuller_plan(seed: int, contention: Contention) -> None:
    full, short = full_and_short(seed, contention)
    found = with_relays(full, kept_stages(short), short.rules)
    whole, less = simulate(full), simulate(found)
    for node in full.nodes:
        assert less.busy_s[node] <= whole.busy_s[node] + 1e-9
        assert less.peak_memory[node] <= whole.peak_memory[node]
    assert contention != "none" or less.iteration_s <= whole.iteration_s + 1e-9


def test_keeping_all_stages_changes_nothing_but_what_is_said_of_the_path() -> None:
    full, _ = full_and_short(1)
    found = with_relays(full, kept_stages(full), full.rules)
    assert (found.order, found.predicted.iteration_s) == (full.order, full.predicted.iteration_s)
    assert not any(microbatch.relays for microbatch in found.microbatches)


@pytest.mark.parametrize("relays", [0.0, 0.5])
def test_all_at_half_the_pace_takes_twice_as_long(relays: float) -> None:
    drawn = random_plan(3, relays=relays)
    bare = {"task_overhead_s": 0.0, "reduce_s": (0.0,) * len(drawn.stages)}
    plan = drawn.model_copy(update={"costs": drawn.costs.model_copy(update=bare)})
    links = {(one, other): 2.0 for one in plan.nodes for other in plan.nodes if one != other}
    paced = at_pace(plan, dict.fromkeys(plan.nodes, 2.0), links)
    assert paced.predicted.iteration_s == pytest.approx(2 * simulate(plan).iteration_s)


def test_what_relays_wait_for_is_put_down_to_transfers() -> None:
    full, short = full_and_short(1)
    plan = with_relays(full, kept_stages(short), short.rules)
    slow = at_pace(plan, {}, {(one, other): 50.0 for one in plan.nodes for other in plan.nodes if one != other})
    path = critical_path(slow)
    assert {"forward relay", "backward relay"} & path.by_kind.keys()
    assert bottleneck(slow, path).startswith("Bottleneck: transfers, ")
