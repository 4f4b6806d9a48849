"""One rank, or one process: the loss of an iteration with messages that are known by their order, as NCCL knows them.

python ordered_rank.py EXPERIMENT PLAN        (alone, or under torchrun)
"""

import json
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from skippipe.config.experiment_file import load_experiment
from skippipe.data.samples import SampleOrder
from skippipe.data.token_cache import open_cache
from skippipe.model.architecture import experiment_model
from skippipe.runtime.distributed_runner import DistributedRunner
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.runner import Runner
from skippipe.runtime.runner_factory import make_runner, make_stage
from skippipe.runtime.runner_options import runner_options
from skippipe_scheduler.plan.validate import load_plan


def main(config_path: Path, plan_path: Path) -> None:
    """Run one iteration; rank 0 prints its loss."""
    experiment, plan = load_experiment(config_path), load_plan(plan_path)
    training, config = experiment.training, experiment_model(experiment)
    cache = open_cache(experiment.data, experiment.seed)
    order = SampleOrder(cache, seed=experiment.seed, sequence_length=training.sequence_length)
    with closing(DistributedContext.from_environment(experiment.comm.timeout_s)) as context:
        runner: Runner
        if context.world_size == 1:
            runner = make_runner(experiment, plan, config, context)
        else:
            options = replace(runner_options(experiment, config, context), matching="order")
            held = plan.stage_of[plan.nodes[context.rank]]
            stage = make_stage(plan, held, config, experiment.seed, options)
            runner = DistributedRunner.connect(plan, stage, context, options)
        with closing(runner):
            result = runner.train_iteration(
                lambda microbatch: order.batch(0, microbatch, training.num_microbatches, training.micro_batch_size),
                lambda: None,
            )
            loss = runner.sum_over_ranks([result.loss])[0]
            runner.barrier()
    if context.rank == 0:
        print(json.dumps(loss))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
