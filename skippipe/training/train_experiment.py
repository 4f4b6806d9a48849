"""Training from an experiment alone: plans, ranks and loop brought together, as `skippipe train` does it."""

from pathlib import Path

from skippipe.config.experiment import Experiment
from skippipe.planning.sharing import share_plans
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.training.loop import TrainingSummary, train
from skippipe.training.optimizer.deepspeed_setup import prepare
from skippipe.training.run_owner import owned_run_directory
from skippipe.training.signals import StopSignal
from skippipe_scheduler.problem.cluster import load_cluster


def train_experiment(
    experiment: Experiment, plan_path: Path | None = None, stop: StopSignal | None = None
) -> TrainingSummary:
    """Train the experiment's model along its plan, from the run's newest checkpoint if there is one.

    Under torchrun every process calls this and is one node of the plan; a process alone runs every stage.

    Args:
        experiment: What to train, as `skippipe.load_experiment` reads it.
        plan_path: A plan file. Without one it is RUN/plan.json where that fits the experiment, else a new plan.
        stop: What says that a signal came; without one, signals stop the training after a step.

    Returns:
        How the training ended; the same on every rank but for `rank`.

    Raises:
        SkipPipeError: One of its kinds, with the exit code of the command: input that does not fit, no feasible plan,
            a lost rank, a checkpoint that cannot be saved, a loss that is not finite.

    Examples:
        >>> summary = train_experiment(experiment)
        279,488 parameters, 4 microbatches over 2 of 3 stages, one process, plan ...
        ...
        step 2/2  loss ...
        ...
        >>> summary.step
        2
    """
    patience_s = prepare(experiment)
    nodes = [node.name for node in load_cluster(Path(experiment.cluster)).members()]
    timeout_s = experiment.comm.timeout_s
    with (
        DistributedContext.from_environment(timeout_s, nodes=nodes, patience_s=patience_s) as context,
        owned_run_directory(experiment.run_path, context),
    ):
        return train(experiment, share_plans(experiment, plan_path, context), context, stop)
