"""Real processes over gloo: their gradients, losses and evaluations are those of one process."""

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from random_plans import random_plan
from ranks import (
    finish_ranks,
    gradients_of,
    make_batch,
    make_config,
    make_experiment,
    start_ranks,
)
from safetensors.torch import load_file
from torch import Tensor

from skippipe.errors import PlanError
from skippipe.model.full_model import build_full
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.runner import Runner
from skippipe.runtime.runner_factory import make_runner
from skippipe_scheduler.plan.plan import Plan

WORLD_SIZE = 5
NUM_RANDOM = 32
ALONE = DistributedContext(rank=0, world_size=1, local_rank=0, timeout_s=1.0)


def small_plan(seed: int, relays: float = 0.0) -> Plan:
    rng = random.Random(seed)
    num_stages = rng.randint(2, 4)
    return random_plan(
        seed,
        num_nodes=WORLD_SIZE,
        num_stages=num_stages,
        route_length=rng.randint(2, num_stages),
        num_microbatches=rng.randint(1, 5),
        split=0.6 * (seed % 2),
        relays=relays,
        time_scale_s=1e-4,  # so that every task is late
    )


Sections = dict[str, Any]
WAYS: list[Sections] = [{}, {"matching": "order"}, {"comm": {"executor": "dynamic"}}]
"""How the ranks of a plan exchange messages and order their tasks, in turn."""


RELAYED = (0, 1, 5, 6, 10, 14)
"""Of each way one with messages as they are or in another dtype, and one with int8."""


def options_of(index: int) -> Sections:
    way = WAYS[index % len(WAYS)]
    training = {"gradient_normalization": "visits" if index % 2 == 0 else "global"}
    if index % 5 == 0:
        training["activation_checkpointing"] = "full"
    comm = ({"activation_dtype": "bfloat16"}, {}, {"activation_compression": "int8"}, {})[index % 4]
    return way | {"training": training, "comm": way.get("comm", {}) | comm}


def make_plans() -> dict[str, tuple[Plan, Sections]]:
    plans = {f"random-{seed:02}": (small_plan(seed), options_of(seed)) for seed in range(NUM_RANDOM)}
    lora = {"r": 2}
    for seed in (1, 3, 10):  # with weight gradients apart, in full order, with checkpointing
        plans[f"adapters-{seed}"] = small_plan(seed), options_of(seed) | {"lora": lora}
    for seed in RELAYED:
        plans[f"relayed-{seed:02}"] = small_plan(seed, relays=0.7), options_of(seed)
    plans["full"] = (random_plan(1, num_nodes=WORLD_SIZE, num_stages=3, route_length=3, swaps=0), {})
    return plans


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[Plan, Sections]]]:
    """Run all plans in one set of processes, because starting them takes longer than the plans do."""
    folder = tmp_path_factory.mktemp("distributed")
    plans = make_plans()
    for name, (plan, options) in plans.items():
        plan.save(folder / f"{name}.plan.json")
        (folder / f"{name}.options.json").write_text(json.dumps(options))
    results = finish_ranks(start_ranks(folder, "gradients", WORLD_SIZE), timeout_s=150)
    assert [code for code, _ in results] == [0] * WORLD_SIZE, results
    return folder, plans


def assert_close(measured: Tensor, expected: Tensor, name: str) -> None:
    scale = max(float(expected.abs().max()), 1e-3)
    torch.testing.assert_close(measured, expected, rtol=1e-6, atol=1e-6 * scale, msg=lambda text: f"{name}: {text}")


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_gradients_equal_those_of_one_process(
    finished: tuple[Path, dict[str, tuple[Plan, Sections]]],
) -> None:
    folder, plans = finished
    idle_replicas = reordered = relayed = 0
    for name, (plan, options) in plans.items():
        sections = {name: section for name, section in options.items() if name != "matching"}
        local = make_runner(make_experiment(**sections), plan, make_config(plan.num_layers), ALONE)
        expected: dict[str, Tensor] = {}
        result = local.train_iteration(make_batch, partial(keep_gradients, expected, local))
        evaluated = local.evaluate(make_batch, 3)
        owned: list[str] = []
        for rank, node in enumerate(plan.nodes):
            held = load_file(folder / f"{name}.{rank}.safetensors")
            stage = local.stages[plan.stage_of[node]]
            assert held.keys() == stage.trained_parameters().keys()
            for key, gradient in held.items():
                assert_close(gradient, expected[key], f"{name}, rank {rank}, {key}")
            numbers = json.loads((folder / f"{name}.{rank}.json").read_text())
            assert numbers["loss"] == pytest.approx(result.loss, rel=1e-6)
            assert numbers["evaluated"] == pytest.approx(evaluated, rel=1e-6)
            assert numbers["collectives"] == 0, "an iteration makes no ranks wait for all others, but in `step`"
            owned += numbers["owned"]
            tasks = [(node, task.operation, task.microbatch) for task in plan.order[node]]
            ran = [tuple(span) for span in numbers["spans"] if span[1] != "REDUCE"]
            if options.get("comm", {}).get("executor") == "dynamic":
                reordered += ran != tasks
                assert sorted(ran) == sorted(tasks)
            else:
                assert ran == tasks
            idle_replicas += not tasks
            relayed += sum(operation == "RF" for _, operation, _ in ran)
        assert sorted(owned) == sorted(local.parameters())
    assert idle_replicas > 5, "the random plans should hold replicas without microbatches"
    assert reordered > 5, "the dynamic executor should give way to what has arrived"
    assert relayed > 5 * len(RELAYED), "the random plans should hold relays"


@pytest.mark.slow
def test_full_pipeline_equals_the_plain_model(
    finished: tuple[Path, dict[str, tuple[Plan, Sections]]],
) -> None:
    folder, plans = finished
    plan, _ = plans["full"]
    model = build_full(make_config(plan.num_layers), 7, torch.device("cpu"), torch.float32)
    for microbatch in range(len(plan.microbatches)):
        input_ids, labels = make_batch(microbatch)
        logits = model(input_ids=input_ids).logits  # (B, T, V)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        (loss / len(plan.microbatches)).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    seen = set()
    for rank in range(WORLD_SIZE):
        for name, gradient in load_file(folder / f"full.{rank}.safetensors").items():
            assert_close(gradient, expected[name], name)
            seen.add(name)
    assert seen == set(expected)


def keep_gradients(kept: dict[str, Tensor], runner: Runner) -> None:
    kept.update(gradients_of(runner))


def test_wrong_number_of_processes_is_refused() -> None:
    context = DistributedContext(rank=0, world_size=3, local_rank=0, timeout_s=1.0)
    plan = small_plan(0)
    with pytest.raises(PlanError, match="3 processes run but the plan has 5 nodes; start 5 processes"):
        make_runner(make_experiment(), plan, make_config(plan.num_layers), context)


def test_plan_of_another_model_is_refused() -> None:
    plan = small_plan(0)
    with pytest.raises(PlanError, match=f"splits {plan.num_layers} layers but the model has 9"):
        make_runner(make_experiment(), plan, make_config(9), ALONE)
