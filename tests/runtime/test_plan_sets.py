"""Several plans in one run: what they must share, and that changing the plan leaves ranks equal to one process."""

import json
from pathlib import Path

import pytest
from plan_set_ranks import COURSE, WAYS, WORLD_SIZE, descend, make_plans, make_ranks_runner
from random_plans import random_plan
from ranks import finish_ranks, make_batch, start_ranks

from skippipe.errors import PlanError
from skippipe.planning.surviving_plans import improved_plans, plans_without
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.runtime.ranks.context import DistributedContext
from skippipe_scheduler.plan.simulate import simulate

ALONE = DistributedContext(rank=0, world_size=1, local_rank=0, timeout_s=1.0)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_ranks_that_change_plans_have_the_losses_of_one_process(tmp_path: Path) -> None:
    results = finish_ranks(start_ranks(tmp_path, "plan_set_ranks:run", WORLD_SIZE), timeout_s=100)
    assert [code for code, _ in results] == [0] * WORLD_SIZE, results
    alone = {way: descend(make_ranks_runner(way, ALONE)) for way in ("tags", "order")}
    for way, expected in {
        **dict.fromkeys(WAYS, alone["tags"]),
        **dict.fromkeys(("order", "dynamic"), alone["order"]),
    }.items():
        assert json.loads((tmp_path / f"{way}.json").read_text()) == pytest.approx(expected, abs=1e-5), way
    assert len(alone["tags"]) == len(COURSE) + 1
    assert alone["tags"][-1] < alone["tags"][0] - 0.05
    assert alone["tags"] != pytest.approx(alone["order"], abs=1e-4), "visits should rescale"


def test_each_iteration_walks_its_plan() -> None:
    plans, runner = make_plans(), make_ranks_runner("tags", ALONE)
    for name, plan in plans.items():
        spans = runner.train_iteration(make_batch, lambda: None, name).spans
        assert {span[:3] for span in spans} == {
            (node, task.operation, task.microbatch) for node, tasks in plan.order.items() for task in tasks
        }


def test_unknown_plan_is_named_with_those_there_are() -> None:
    runner = make_ranks_runner("tags", ALONE)
    with pytest.raises(PlanError, match="no plan 'long' in this run; it has 'main', 'full', 'split', 'short'"):
        runner.train_iteration(make_batch, lambda: None, "long")


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"num_nodes": 5, "num_stages": 3}, "nodes"),
        ({"num_nodes": 4, "num_stages": 3, "layers_per_stage": 1}, "stages"),
        ({"num_microbatches": 4}, "microbatches"),
    ],
)
def test_plans_of_a_set_share_placement_and_microbatches(options: dict[str, int], difference: str) -> None:
    main = make_plans().main
    beside = {} if "num_nodes" in options else {"beside": main}
    other = random_plan(9, route_length=2, **{"num_microbatches": 5} | options, **beside)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=f"plan 'other' has other {difference} than the main plan"):
        PlanSet(main, {"other": other})


def test_set_travels_as_text_and_has_one_hash() -> None:
    plans = make_plans()
    assert PlanSet.from_json(plans.to_json()) == plans
    assert PlanSet(plans.main).hash == plans.main.hash
    fewer = PlanSet(plans.main, {"full": plans["full"]})
    renamed = PlanSet(plans.main, {"fuller": plans["full"]})
    assert len({plans.hash, plans.main.hash, fewer.hash, renamed.hash}) == 4


def test_plans_at_other_paces_are_exactly_timed_and_come_back() -> None:
    plans = make_plans()
    paced = plans.at_pace({"node-0": 3.0}).at_pace({"node-0": 0.5, "node-1": 2.0})
    assert paced.pace == {"node-0": 1.5, "node-1": 2.0}
    assert PlanSet.from_json(paced.to_json()) == paced
    for name, plan in paced.items():
        assert plan.predicted.iteration_s == simulate(plans[name], slowdown={"node-0": 1.5, "node-1": 2.0}).iteration_s
        assert plan.predicted.lower_bound_s <= plans[name].predicted.lower_bound_s
    back = paced.at_pace({"node-0": 1 / 1.5, "node-1": 0.5})
    assert back.main.predicted.iteration_s == pytest.approx(plans.main.predicted.iteration_s)
    assert back.main.costs.backward_s == pytest.approx(plans.main.costs.backward_s)


def test_messages_at_other_paces_are_exactly_timed_and_come_back() -> None:
    plans, pair = make_plans(), ("node-0", "node-1")
    paced = plans.at_pace({}, {pair: 3.0}).at_pace({}, {pair: 0.5})
    assert paced.link_pace == {pair: 1.5}
    assert PlanSet.from_json(paced.to_json()) == paced
    before, after = plans.main.costs.transfer_s, paced.main.costs.transfer_s
    assert after["node-0"]["node-1"] == pytest.approx(1.5 * before["node-0"]["node-1"])
    assert after["node-1"] == before["node-1"]
    assert paced.main.predicted.iteration_s == simulate(paced.main).iteration_s
    back = paced.at_pace({}, {pair: 1 / 1.5})
    assert back.main.predicted.iteration_s == pytest.approx(plans.main.predicted.iteration_s)


def test_measured_paces_stay_with_plans_that_follow() -> None:
    plans = PlanSet(random_plan(2, num_nodes=3, num_stages=2, route_length=2))
    plans = plans.at_pace({"node-1": 4.0}, {("node-0", "node-2"): 2.0})
    lost = plans.main.stages[1].nodes[0]
    assert plans_without(plans, [lost], time_limit_s=0, lost_stage="routes_around").pace == plans.pace
    assert improved_plans(plans, time_limit_s=0).link_pace == plans.link_pace
    assert improved_plans(plans, time_limit_s=0).pace == plans.in_rank_order(plans.main.nodes[::-1]).pace == plans.pace
