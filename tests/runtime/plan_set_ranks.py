"""Ranks that change the plan from one iteration to the next, each step by plain gradient descent."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from random_plans import random_plan
from ranks import make_batch, make_config, make_experiment

from skippipe.runtime.distributed_runner import DistributedRunner
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.runner import Runner
from skippipe.runtime.runner_factory import make_runner, make_stage
from skippipe.runtime.runner_options import runner_options

WORLD_SIZE = 4
COURSE = ("main", "full", "split", "full", "main", "short", "split", "main")
"""The plan of each iteration."""
VISITS: dict[str, Any] = {
    "training": {"gradient_normalization": "visits", "max_steps": len(COURSE), "activation_checkpointing": "selective"},
    "recipe": {
        "rescale_stages": True,
        "layer_dropout": {"probability": 0.6, "over_steps": "growing", "rescale": True},
        "ffn_dropout": {"probability": 0.5, "over_depth": "uniform", "unit": "microbatch"},
        "early_exit_loss": 0.3,
    },
}
WAYS: dict[str, dict[str, Any]] = {
    "tags": {},
    "order": VISITS,
    "dynamic": VISITS | {"comm": {"executor": "dynamic"}},
}
LEARNING_RATE = 1.0


def make_plans() -> PlanSet:
    """Return four plans on one placement, with routes of 2 to 3 stages, one with split backwards."""
    shape: dict[str, Any] = {"num_microbatches": 5, "time_scale_s": 1e-4}
    main = random_plan(3, num_nodes=WORLD_SIZE, num_stages=3, route_length=2, layers_per_stage=2, **shape)
    further = {
        "full": random_plan(4, route_length=3, swaps=0, beside=main, **shape),
        "split": random_plan(5, route_length=3, split=0.8, beside=main, **shape),
        "short": random_plan(6, route_length=2, beside=main, **shape),
    }
    return PlanSet(main, further)


def descend(runner: Runner) -> list[float]:
    """Run the course; return this process's part of the loss of every iteration, and of an evaluation in between."""

    @torch.no_grad()
    def step() -> None:
        for parameter in runner.parameters().values():
            if parameter.grad is not None:
                parameter.sub_(LEARNING_RATE * parameter.grad)

    losses = []
    for number, name in enumerate(COURSE):
        result = runner.train_iteration(make_batch, step, name)
        losses.append(runner.sum_over_ranks([result.loss])[0])
        if number == 3:
            losses.append(runner.evaluate(make_batch, 3))
    return losses


def make_ranks_runner(way: str, context: DistributedContext) -> Runner:
    """Return the runner of this process; with "order" messages match as they do on NCCL."""
    plans, experiment = make_plans(), make_experiment(**WAYS[way])
    config = make_config(plans.main.num_layers)
    if way != "order" or context.world_size == 1:
        return make_runner(experiment, plans, config, context)
    options = replace(runner_options(experiment, config, context), matching="order")
    held = plans.main.stage_of[plans.main.nodes[context.rank]]
    stage = make_stage(plans.main, held, config, experiment.seed, options)
    return DistributedRunner.connect(plans, stage, context, options)


def run(folder: Path, context: DistributedContext) -> None:
    """Run the course in every way; rank 0 writes the losses."""
    for way in WAYS:
        runner = make_ranks_runner(way, context)
        losses = descend(runner)
        if context.rank == 0:
            (folder / f"{way}.json").write_text(json.dumps(losses))
        runner.close()
