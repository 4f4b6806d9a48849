"""Training from an experiment alone: plans, ranks and loop brought together, as `skippipe train` does it."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from skippipe.config.experiment import Experiment
from skippipe.planning.sharing import share_plans
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.training.loop import train
from skippipe.training.optimizer.deepspeed_setup import prepare
from skippipe.training.recovery.recovery_choice import may_find_a_run
from skippipe.training.run_owner import owned_run_directory
from skippipe.training.signals import StopSignal
from skippipe.training.trainer import TrainingSummary
from skippipe_scheduler.problem.cluster import load_cluster

if TYPE_CHECKING:
    from skippipe.membership.live_run import LiveRun


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
    signals = StopSignal() if stop is None else nullcontext(stop)
    with signals as given:
        while True:
            with DistributedContext.from_environment(
                timeout_s, nodes=nodes, patience_s=patience_s, find_live_run=_finder(experiment)
            ) as context:
                if context.live_run is None:
                    with owned_run_directory(experiment.run_path, context):
                        return train(experiment, share_plans(experiment, plan_path, context), context, given)
                summary = _join(experiment, context, given)
            if summary is not None:
                return summary


def _finder(experiment: Experiment) -> Callable[[Sequence[str]], "LiveRun | None"] | None:
    """Return what looks for a run under way, where a process can join one."""
    if not may_find_a_run(experiment):
        return None

    def find(texts: Sequence[str]) -> "LiveRun | None":
        from skippipe.membership.live_run import find_live_run, kept_contacts

        return find_live_run([*texts, *kept_contacts(experiment.run_path)])

    return find


def _join(experiment: Experiment, context: DistributedContext, stop: StopSignal) -> TrainingSummary | None:
    from skippipe.training.joining.newcomer import train_newcomer

    return train_newcomer(experiment, context, stop)
