"""Training from an experiment alone: plans, ranks and loop brought together, as `skippipe train` does it."""

from pathlib import Path

from skippipe.config.experiment import Experiment
from skippipe.training.joining.launched import train_launched
from skippipe.training.signals import StopSignal
from skippipe.training.trainer import TrainingSummary


def train_experiment(
    experiment: Experiment, plan_path: str | Path | None = None, stop: StopSignal | None = None
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
    plan_path = None if plan_path is None else Path(plan_path)
    return train_launched(experiment, plan_path, stop)
