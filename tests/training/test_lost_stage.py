"""What becomes of a stage that nobody holds: which way is taken, by whom, and with which weights."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from random_plans import random_plan
from training_runs import CLUSTER, make_experiment

from skippipe.config.recovery_options import LostStageWay, RecoveryOptions
from skippipe.errors import InfeasibleError
from skippipe.planning.moved_nodes import MovedNodes
from skippipe.planning.surviving_plans import plans_without
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.training.recovery.lost_stage.from_neighbours import rebuilt
from skippipe.training.recovery.lost_stage.preference import WAYS, places_without, ways_to_state
from skippipe.training.recovery.lost_stage.situation import Situation
from skippipe.training.recovery.stage_state import StageState
from skippipe_scheduler.plan.validate import validate
from skippipe_scheduler.search.kernel.jit import prepare

prepare(None)  # a search without time would not wait for the kernel
MAIN = random_plan(2, num_nodes=5, num_stages=3, route_length=2, num_microbatches=4, layers_per_stage=2)
PLANS = PlanSet(MAIN, {"phase-1": random_plan(4, route_length=2, num_microbatches=4, beside=MAIN)})
SOLE = {index: stage.nodes[0] for index, stage in enumerate(MAIN.stages) if len(stage.nodes) == 1}
DEFAULT = RecoveryOptions().lost_stage

Losing = Callable[..., Situation]


@pytest.fixture(scope="module")
def losing(tmp_path_factory: pytest.TempPathFactory) -> Losing:
    """Return what makes the situation of a run that has lost a stage."""
    folder: Path = tmp_path_factory.mktemp("lost-stage")
    experiment = make_experiment(folder)
    (folder / "cluster.yaml").write_text(CLUSTER.replace("count: 4", f"count: {len(MAIN.nodes)}"))
    moves = MovedNodes(experiment)

    def situation(stage: int, copies: Mapping[str, int], *, checkpoint: bool = False) -> Situation:
        members = tuple(node for node in MAIN.nodes if node not in MAIN.stages[stage].nodes)
        saved = frozenset({stage} if checkpoint else {})
        return Situation(PLANS, members, frozenset(members), {stage: copies}, saved, moves, limit_s=10.0)

    return situation


def free_nodes() -> list[str]:
    return [node for stage in MAIN.stages if len(stage.nodes) > 1 for node in stage.nodes]


def test_the_node_with_the_newest_copy_takes_the_stage_over(losing: Losing) -> None:
    for stage, gone in SOLE.items():
        older, newer = free_nodes()[:2]
        given = losing(stage, {older: 4, newer: 9})
        found = places_without(given, DEFAULT)
        stages = found.main.stages
        assert stages[stage].nodes == (newer,)
        assert gone in stages[MAIN.stage_of[newer]].nodes  # there it is a replica when it comes back
        assert found.main.nodes == MAIN.nodes
        assert [held.layers for held in stages] == [held.layers for held in MAIN.stages]
        left = plans_without(found, given.lost, time_limit_s=0.0)
        for name in PLANS:
            for plan in (found[name], left[name]):
                validate(plan)
                assert plan.rules == PLANS[name].rules
                assert [each.id for each in plan.microbatches] == [each.id for each in MAIN.microbatches]


def test_where_the_copy_is_with_a_node_that_is_needed_another_one_fetches_it(losing: Losing) -> None:
    stage, other = sorted(SOLE)
    found = places_without(losing(stage, {SOLE[other]: 7}), DEFAULT)
    assert found.main.stage_of[SOLE[other]] == other
    assert found.main.stages[stage].nodes[0] in free_nodes()


def test_nobody_leaves_a_stage_that_nobody_else_has_the_state_of(losing: Losing) -> None:
    stage = min(SOLE)
    given = losing(stage, {})
    stays = {held.nodes[0] for held in MAIN.stages}  # the others have come lately
    found = places_without(given._replace(standing=frozenset(stays), copies={stage: {free_nodes()[0]: 3}}), DEFAULT)
    assert found.main.stages[stage].nodes[0] not in stays


def test_only_a_host_with_the_text_takes_over_stage_0(losing: Losing) -> None:
    given = losing(0, dict.fromkeys(free_nodes(), 3))
    reader = max(set(free_nodes()) - set(MAIN.stages[0].nodes))
    others = frozenset(free_nodes()) - {reader}
    assert places_without(given._replace(without_text=others), ("copy", "stop")).main.stages[0].nodes[0] == reader
    with pytest.raises(InfeasibleError, match="no host that is left has the text"):
        places_without(given._replace(without_text=frozenset(free_nodes())), ("copy", "stop"))


def test_the_first_way_that_is_possible_is_taken(losing: Losing) -> None:
    stage = max(SOLE)
    assert places_without(losing(stage, {}), DEFAULT) is PLANS  # routes around it
    moved = places_without(losing(stage, {}, checkpoint=True), ("checkpoint", "routes_around"))
    assert moved.main.stages[stage].nodes != MAIN.stages[stage].nodes
    with pytest.raises(InfeasibleError, match=f"stage {stage} .*nobody has a copy.*no checkpoint yet.*says stop"):
        places_without(losing(stage, {}), ("copy", "checkpoint", "stop"))
    with pytest.raises(InfeasibleError, match="rebuild: stage 2 is not between two others"):
        places_without(losing(2, {}), ("rebuild", "stop"))


def test_a_stage_is_rebuilt_where_both_its_neighbours_live(losing: Losing) -> None:
    found = places_without(losing(1, {}), ("rebuild", "stop"))
    assert found.main.stages[1].nodes[0] in MAIN.stages[2].nodes
    lately = losing(1, {})._replace(standing=frozenset(MAIN.stages[2].nodes))
    with pytest.raises(InfeasibleError, match="rebuild: nobody has stage 0 beside it either"):
        places_without(lately, ("rebuild", "stop"))
    uneven = MAIN.stages[2].model_copy(update={"layers": (4, 7)})
    plan = MAIN.model_copy(update={"stages": (*MAIN.stages[:2], uneven)})
    with pytest.raises(InfeasibleError, match="stages 0 to 2 have 2, 2, 3 layers"):
        places_without(losing(1, {})._replace(plans=PlanSet(plan)), ("rebuild", "stop"))


def test_nobody_can_take_over_where_all_are_needed(losing: Losing) -> None:
    given = losing(0, {MAIN.stages[1].nodes[0]: 3})
    alone = tuple(held.nodes[0] for held in MAIN.stages[1:])
    with pytest.raises(InfeasibleError, match="every node that is left holds its stage alone"):
        places_without(given._replace(members=alone, standing=frozenset(alone)), DEFAULT)


def test_a_returning_node_looks_for_its_state_in_the_order_given() -> None:
    def names(*order: LostStageWay) -> list[str]:
        return [next(name for name, way in WAYS.items() if way is found) for found in ways_to_state(order)]

    assert names("rebuild", "copy", "stop") == ["rebuild", "copy", "stop"]
    assert names("routes_around", "stop") == ["routes_around", "stop", "copy", "checkpoint"]


def test_a_stage_is_rebuilt_as_the_mean_of_its_neighbours_by_their_gradients() -> None:
    def held(layer: int, weight: float, squared_norm: float) -> StageState:
        names = [f"model.layers.{layer + index}.mlp.experts.7.weight" for index in range(2)]
        weights = {name: torch.full((2,), weight + index) for index, name in enumerate(names)}
        return StageState(5, 1.0, weights, {f"{names[0]}.exp_avg": torch.ones(2)}, {}, squared_norm)

    names = ("model.layers.2.mlp.experts.7.weight", "model.layers.3.mlp.experts.7.weight")
    found = rebuilt(held(0, 1.0, 3.0), held(4, 5.0, 1.0), names, 2)
    assert {name: tensor.tolist() for name, tensor in found.parameters.items()} == {
        names[0]: [2.0, 2.0],  # (3 * 1 + 1 * 5) / 4
        names[1]: [3.0, 3.0],
    }
    assert found.step == 5
    for name in names:
        assert not any(found.optimizer[f"{name}.{key}"].any() for key in ("exp_avg", "exp_avg_sq", "step"))
        assert found.optimizer[f"{name}.lr_scale"].item() == pytest.approx(1.1)
    even = rebuilt(held(0, 1.0, 0.0), held(4, 5.0, 0.0), names, 2)
    assert even.parameters[names[0]].tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("given", "ways"), [("stop", ("stop",)), ("routes_around", ("routes_around", "stop")), (["copy"], ("copy",))]
)
def test_one_word_stands_for_that_way_else_stop(given: object, ways: tuple[str, ...]) -> None:
    assert RecoveryOptions.model_validate({"lost_stage": given}).lost_stage == ways


@pytest.mark.parametrize(
    ("given", "message"),
    [(["copy", "copy"], "name every way once"), (["stop", "copy"], "put it last"), ([], "at least")],
)
def test_an_order_that_makes_no_sense_is_refused(given: list[str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RecoveryOptions.model_validate({"lost_stage": given})
