"""124M parameters, normal training beside two recipes at equal FLOP, evaluated at five depths.

As many tokens as the time allows: the first steps of normal training say how long one takes.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from setting import ALONE, Figures, make_experiment, plans_of

from skip_tolerance.depths import perplexities
from skippipe.config.experiment import Experiment
from skippipe.model.architecture import experiment_model
from skippipe.model.cost import model_cost
from skippipe.model.device import torch_dtype
from skippipe.runtime.plans.plan_schedule import PlanSchedule
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.training.loop import open_trainer
from skippipe.training.measurement.utilisation import IterationFlop
from skippipe.training.signals import StopSignal

NUM_STAGES, NUM_DEPTHS = 6, 5
PROBE_STEPS = 3
EVALUATED = 0.15
"""Part of the time that is left for the evaluations. Chosen: 5 depths are up to 10 choices of stages each."""
SKIP: Mapping[str, Any] = {"skip_ratio": 0.33, "max_swaps": 0, "max_forward_jump": 5}
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "normal": {},
    "skip, full depth every 10th": {"pipeline": SKIP, "recipe": {"full_depth_interval": 10}},
    "mixed, redrawn routes": {
        "pipeline": {**SKIP, "route_lengths": {6: 1, 4: 1, 3: 2}},
        "recipe": {"redrawn_routes": 8},
    },
}
"""Normal training and the two recipes that were best at CPU size (benchmarks/skip_tolerance/results.md)."""


def experiments(folder: Path, *, rehearse: bool) -> list[Experiment]:
    """Return one for each recipe; how many steps they take is found out on the card."""
    return [_experiment(folder, name, 100, rehearse=rehearse) for name in RECIPES]


def measure(figures: Figures, folder: Path, carried: Path | None) -> None:
    """Train one after the other, for as much computation each; add the perplexities at every depth."""
    plans = {
        name: plans_of(experiment, carried)
        for name, experiment in zip(RECIPES, experiments(folder, rehearse=figures.rehearse), strict=True)
    }
    steps = _affordable_steps(figures, folder, plans["normal"])
    budget = steps * _flop_of_step(_experiment(folder, "normal", steps, rehearse=figures.rehearse), plans["normal"])
    for name in RECIPES:
        draft = _experiment(folder, name, steps, rehearse=figures.rehearse)
        own_steps = max(4, round(budget / _flop_of_step(draft, plans[name])))
        experiment = _experiment(folder, name, own_steps, rehearse=figures.rehearse)
        _train(figures, name, experiment, plans[name])


def _train(figures: Figures, name: str, experiment: Experiment, plans: PlanSet) -> None:
    training = experiment.training
    size, count = (1, 1) if figures.rehearse else (16, 4)
    with StopSignal() as stop, open_trainer(experiment, plans, ALONE) as trainer:
        while trainer.state.step < training.max_steps:
            trainer.one_step(stop)
        batches = [
            tuple(part.to(figures.device) for part in trainer.order.validation_batch(index, size))
            for index in range(count)
        ]
        depths = range(NUM_STAGES, NUM_STAGES - NUM_DEPTHS, -1)
        found = perplexities(trainer.state.runner.stages, [(batch[0], batch[1]) for batch in batches], list(depths))
        tokens = trainer.state.step * trainer.state.tokens_per_step
    for layers, perplexity in found.items():
        figures.add(
            f"{name}, {tokens / 1e6:.1f}M tokens: {layers} layers, mean of all choices",
            perplexity["mean"],
            "perplexity",
        )


def _affordable_steps(figures: Figures, folder: Path, plans: PlanSet) -> int:
    """Return how many steps normal training has time for."""
    probe = _experiment(folder, "probe", 1000, rehearse=figures.rehearse)
    start_s = time.perf_counter()
    with StopSignal() as stop, open_trainer(probe, plans, ALONE) as trainer:
        trainer.one_step(stop)  # warms up
        first_s = time.perf_counter()
        for _ in range(PROBE_STEPS):
            trainer.one_step(stop)
        step_s = (time.perf_counter() - first_s) / PROBE_STEPS
    left_s = figures.seconds * (1 - EVALUATED) - (time.perf_counter() - start_s)
    return 4 if figures.rehearse else max(10, int(left_s / len(RECIPES) / step_s))


def _flop_of_step(experiment: Experiment, plans: PlanSet) -> float:
    """Return the FLOP of a step, mean over those that the recipe asks for."""
    training = experiment.training
    dtype = torch_dtype(training.dtype)
    cost = model_cost(experiment_model(experiment), training.micro_batch_size, training.sequence_length, dtype)
    schedule = PlanSchedule.of(experiment)
    flop = IterationFlop(cost, experiment.recipe, training.max_steps)
    of_steps = [flop.of(plans[schedule.plan_of(step + 1)], step) for step in range(training.max_steps)]
    return sum(of_steps) / len(of_steps)


def _experiment(folder: Path, name: str, steps: int, *, rehearse: bool) -> Experiment:
    recipe = dict(RECIPES.get(name, {}))
    pipeline = {"num_stages": NUM_STAGES, **recipe.pop("pipeline", {})}
    return make_experiment(
        folder,
        f"convergence-{name.replace(', ', '-').replace(' ', '-')}",
        "124M",
        rehearse=rehearse,
        num_nodes=NUM_STAGES,
        pipeline=pipeline,
        training={"max_steps": steps, "num_microbatches": 20, "micro_batch_size": 1 if rehearse else 8},
        lr_scheduler={"warmup_steps": max(1, steps // 10)},
        data={"tokenizer": "bytes"},
        **recipe,
    )
