"""One training in this process, continued where it stopped, and its perplexities at all depths.

    python benchmarks/skip_tolerance/one_training.py ROW SIZE SEED FOLDER [--prose TEXTS] [--quick]

Writes FOLDER/result.json at the end.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import click
from depths import perplexities
from setups import RESULT, SETUPS, experiment_of, settings_of, size_of
from sizes import NUM_STAGES, SIZES, Size

from common.table import machine
from skippipe.config.experiment import Experiment
from skippipe.model.dropout.probability import expected_share
from skippipe.planning.sharing import choose_plans
from skippipe.runtime.plans.plan_schedule import PlanSchedule
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.training.loop import open_trainer
from skippipe.training.signals import StopSignal

DEPTHS = 5
ALONE = DistributedContext(rank=0, world_size=1, local_rank=0, timeout_s=1.0)


def measure(name: str, size_name: str, seed: int, folder: Path, *, quick: bool, prose: Path | None) -> dict[str, Any]:
    """Train, evaluate, and keep the result."""
    experiment = experiment_of(name, size_name, seed, folder, quick=quick, prose=prose)
    plans = choose_plans(experiment, None)
    start_s = time.perf_counter()
    with StopSignal() as stop, open_trainer(experiment, plans, ALONE) as trainer:
        if trainer.run(stop).stopped:
            raise SystemExit(f"{folder}: stopped after step {trainer.state.step}; the same command continues there")
        trained_s = time.perf_counter() - start_s
        num_batches, size = (1, 2) if quick else (16, 8)
        batches = [trainer.order.validation_batch(index, size) for index in range(num_batches)]
        num_stages = len(trainer.state.runner.stages)
        depths = [kept for kept in range(NUM_STAGES, NUM_STAGES - DEPTHS, -1) if kept <= num_stages]
        found = perplexities(trainer.state.runner.stages, batches, depths)
        elapsed_s = trainer.state.elapsed_s
    result = {
        "recipe": name,
        "size": size_name,
        "seed": seed,
        "settings": settings_of(experiment),
        "steps": experiment.training.max_steps,
        "compute": compute_share(experiment, plans, size_of(size_name, quick=quick)),
        "parameters": sum(
            parameter.numel()
            for stage in trainer.state.runner.stages.values()
            for parameter in stage.global_parameters().values()
        ),
        "perplexity": {str(layers): result for layers, result in found.items()},
        "training_s": round(elapsed_s, 1),
        "evaluation_s": round(time.perf_counter() - start_s - trained_s, 1),
        **machine(Path(__file__).parent),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "quick": quick,
    }
    (folder / RESULT).write_text(json.dumps(result, indent=1) + "\n")
    return result


def compute_share(experiment: Experiment, plans: PlanSet, size: Size) -> float:
    """Return the layer computation of the whole training relative to normal training, by expectation.

    Embedding, head and losses are not counted.
    """
    schedule, recipe = PlanSchedule.of(experiment), experiment.recipe
    max_steps, num_layers = experiment.training.max_steps, plans.main.num_layers
    done = 0.0
    for step in range(max_steps):
        plan = plans[schedule.plan_of(step + 1)]
        for stage, visits in zip(plan.stages, plan.visits, strict=True):
            for layer in range(*stage.layers):
                done += visits * expected_share(
                    recipe, layer=layer, num_layers=num_layers, step=step, max_steps=max_steps, ffn_share=size.ffn_share
                )
    return done / (size.steps * len(plans.main.microbatches) * NUM_STAGES * size.layers_per_stage)


@click.command()
@click.argument("row", type=click.Choice(list(SETUPS)))
@click.argument("size", type=click.Choice(list(SIZES)))
@click.argument("seed", type=int)
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--prose", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--quick", is_flag=True)
def main(row: str, size: str, seed: int, folder: Path, prose: Path | None, quick: bool) -> None:
    """Train one row under one seed."""
    measure(row, size, seed, folder, quick=quick, prose=prose)


if __name__ == "__main__":
    main()
