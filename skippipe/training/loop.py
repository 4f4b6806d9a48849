"""Training from the first step or the newest checkpoint to the end: all ranks begin it together."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext

from skippipe.checkpoint.disks.peer_files import PeerFiles, open_peer_files
from skippipe.config.experiment import Experiment
from skippipe.errors import PlanError
from skippipe.model.architecture import experiment_model
from skippipe.monitor.terminal import say
from skippipe.planning.recipe_plans import check_recipe_plans
from skippipe.planning.workload.experiment_workload import share_activation_memory
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.runner_factory import check_plan, make_runner
from skippipe.training.measurement.memory_report import MemoryReport, check_room
from skippipe.training.recovery.open_membership import open_recovery
from skippipe.training.recovery.recovery_choice import why_off
from skippipe.training.recovery.run_recovery import RunRecovery
from skippipe.training.run_owner import RunOwner, owned_run_directory
from skippipe.training.signals import StopSignal
from skippipe.training.startup import check_start, open_samples
from skippipe.training.trainer import Trainer, TrainingSummary
from skippipe_scheduler.plan.plan import Plan


def train(
    experiment: Experiment, plans: Plan | PlanSet, context: DistributedContext, stop: StopSignal | None = None
) -> TrainingSummary:
    """Train along `plans` until `training.max_steps` or a signal, from the newest checkpoint if there is one.

    All ranks call this together. Raises `PlanError`, `DataError`, `CheckpointError` where inputs do not fit,
    `StorageError` where the last checkpoint cannot be saved, `SkipPipeError` where the loss is not finite.
    Without `stop` signals stop it after a step.
    """
    signals = StopSignal() if stop is None else nullcontext(stop)
    with signals as given, open_trainer(experiment, plans, context) as trainer:
        try:
            summary = trainer.run(given)
            context.finish()
        except Exception:
            context.let_end()
            raise
        return summary


@contextmanager
def open_trainer(experiment: Experiment, plans: Plan | PlanSet, context: DistributedContext) -> Iterator[Trainer]:
    """Check and build all that a run needs and give its trainer, at the newest checkpoint; close it at the end."""
    training = experiment.training
    plans = PlanSet.of(plans)
    plan = plans.main
    if len(plan.microbatches) != training.num_microbatches:
        raise PlanError(
            f"the plan has {len(plan.microbatches)} microbatches, training.num_microbatches is "
            f"{training.num_microbatches}; make them equal, or make a new plan"
        )
    config = experiment_model(experiment)
    check_plan(plan, config.num_hidden_layers, context.world_size)
    check_recipe_plans(experiment, plans)
    hardware = check_start(experiment, plan, context)
    order = open_samples(experiment, plan, context)
    share_activation_memory(experiment, context)
    memory = MemoryReport.of_plans(experiment, plans, context, hardware.device_types)
    check_room(experiment, plan, memory.estimates, context, hardware.device_types)
    off = why_off(experiment, context, hardware.device_types)
    membership: AbstractContextManager[RunRecovery | None] = nullcontext()
    if off is None:
        membership = open_recovery(experiment, plans, context)
    with membership as recovery:
        runner = make_runner(experiment, plans, config, context)
        with (
            closing(runner),
            owned_run_directory(experiment.run_path, context) as owner,
            _peer_files(owner, recovery, plan, context) as peers,
            closing(Trainer(experiment, runner, order, context, hardware, memory, owner, recovery, peers)) as trainer,
        ):
            trainer.restore()
            trainer.open_records()
            if context.rank == 0 and context.store is not None and off and experiment.recovery.enabled == "auto":
                say(f"a lost process ends the run: {off}")
            yield trainer


def _peer_files(
    owner: RunOwner, recovery: RunRecovery | None, plan: Plan, context: DistributedContext
) -> AbstractContextManager[PeerFiles | None]:
    """Return what brings files from disk to disk, where there are several."""
    if owner.disks.shared:
        return nullcontext()
    return open_peer_files(context) if recovery is None else nullcontext(recovery.peer_files(plan.nodes))
