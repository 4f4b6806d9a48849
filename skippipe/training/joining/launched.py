"""One process of a start: it meets the others, or finds their run under way, and trains with them."""

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


def train_launched(
    experiment: Experiment,
    plan_path: Path | None,
    stop: StopSignal | None,
    arrival_s: float = 0.0,
    when_met: Callable[[], None] = lambda: None,
) -> TrainingSummary:
    """Train as `train_experiment`, with processes that may be started `arrival_s` later than others.

    `when_met` is called once all have come, or a run under way is found.
    """
    patience_s = prepare(experiment)
    nodes = [node.name for node in load_cluster(Path(experiment.cluster)).members()]
    timeout_s = experiment.comm.timeout_s
    signals = StopSignal() if stop is None else nullcontext(stop)
    with signals as given:
        while True:
            with DistributedContext.from_environment(
                timeout_s,
                nodes=nodes,
                patience_s=patience_s,
                find_live_run=_finder(experiment),
                arrival_s=arrival_s,
            ) as context:
                when_met()
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
        from skippipe.membership.shared_secret import own_secret

        return find_live_run([*texts, *kept_contacts(experiment.run_path)], own_secret())

    return find


def _join(experiment: Experiment, context: DistributedContext, stop: StopSignal) -> TrainingSummary | None:
    from skippipe.training.joining.newcomer import train_newcomer

    return train_newcomer(experiment, context, stop)
