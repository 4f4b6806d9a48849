"""Builds this process's stages and the runner for them."""

from collections.abc import Callable
from functools import partial

from transformers import PretrainedConfig

from skippipe.config.experiment import Experiment
from skippipe.errors import ConfigError, PlanError
from skippipe.model.architecture import experiment_model
from skippipe.model.compilation import check_compilable, make_ready
from skippipe.model.stage import Stage, build_stage
from skippipe.runtime.distributed_runner import DistributedRunner
from skippipe.runtime.local_runner import LocalRunner
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.runtime.ranks import time_limits
from skippipe.runtime.ranks.agreement import on_all_ranks
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.store_names import Topic
from skippipe.runtime.runner import Runner
from skippipe.runtime.runner_options import RunnerOptions, runner_options
from skippipe_scheduler.plan.plan import Plan


def make_runner(
    experiment: Experiment, plans: Plan | PlanSet, config: PretrainedConfig, context: DistributedContext
) -> Runner:
    """Build this process's stages and the runner for them: one process runs all stages, several one node each.

    Raises `PlanError` where the plans do not fit the model or the number of processes.
    """
    plans = PlanSet.of(plans)
    plan = plans.main
    check_plan(plan, config.num_hidden_layers, context.world_size)
    options = runner_options(experiment, config, context)
    if options.compile:
        _check_compilable(plans, options)
    if context.world_size == 1:
        stages = {stage: make_stage(plan, stage, config, experiment.seed, options) for stage in range(len(plan.stages))}
        return LocalRunner(plans, stages, options)
    index = plan.stage_of[plan.nodes[context.rank]]
    build = partial(make_stage, plan, index, config, experiment.seed, options)
    stage = compiled_together(build, context) if options.compile else build()
    return DistributedRunner.connect(plans, stage, context, options)


def make_unconnected_runner(
    experiment: Experiment, plans: PlanSet, index: int, context: DistributedContext
) -> LocalRunner:
    """Return a runner that has a stage of the plans and is connected to nobody, for the next epoch to begin with."""
    config = experiment_model(experiment)
    alone = DistributedContext(context.rank, 1, context.local_rank, context.timeout_s)
    options = runner_options(experiment, config, alone)
    stage = make_stage(plans.main, index, config, experiment.seed, options)
    runner = LocalRunner(plans, {index: stage}, options)
    runner.rank = context.rank
    return runner


def make_runner_of_epoch(
    experiment: Experiment, plans: PlanSet, before: Runner, context: DistributedContext
) -> DistributedRunner:
    """Return the runner of an epoch, along its plans, with the stage of the one before; all members call it together.

    Raises `CommunicationError` where one of them is lost meanwhile.
    """
    (index, stage), *_ = before.stages.items()
    own = plans.main.stages[index]
    if own.layers != (stage.first, stage.last) or plans.main.nodes[context.rank] not in own.nodes:
        raise PlanError(f"the new plan moves stage {index}, whose weights are here; follow it before the epoch begins")
    options = runner_options(experiment, experiment_model(experiment), context)
    return DistributedRunner.connect(plans, stage, context, options)


def _check_compilable(plans: PlanSet, options: RunnerOptions) -> None:
    check_compilable(options.device, options.activation_checkpointing)
    if any(any(plan.split_of.values()) for _, plan in plans.items()):
        raise ConfigError(
            "training.compile: the plan splits backwards, and a compiled backward is one piece; turn compile off, or "
            "make a plan with pipeline.split_backward=false"
        )


def compiled_together(build: Callable[[], Stage], context: DistributedContext) -> Stage:
    """Return the compiled stage of `build` once every rank has its own; where one fails, all raise its `ConfigError`.

    Ranks meet outside of any process group: compiling may take longer than `comm.timeout_s`.
    """

    def build_own() -> Stage:
        try:
            return build()
        except RuntimeError as reason:  # whatever torch.compile and its compilers raise
            first_line = (str(reason).splitlines() or [type(reason).__name__])[0]
            raise ConfigError(
                f"training.compile: the stage cannot be compiled: {first_line}; set training.compile to false"
            ) from reason

    return on_all_ranks(context, Topic.COMPILED, build_own, limit_s=time_limits.COMPILATION_S)


def check_plan(plan: Plan, num_layers: int, world_size: int) -> None:
    """Raise `PlanError` where the plan was made for another model or another number of processes."""
    if plan.num_layers != num_layers:
        raise PlanError(
            f"the plan splits {plan.num_layers} layers but the model has {num_layers}; make a plan for this model"
        )
    if world_size not in (1, len(plan.nodes)):
        raise PlanError(
            f"{world_size} processes run but the plan has {len(plan.nodes)} nodes; start {len(plan.nodes)} processes "
            "(torchrun: nnodes times nproc-per-node), or one to run every stage in it"
        )


def make_stage(plan: Plan, stage: int, config: PretrainedConfig, seed: int, options: RunnerOptions) -> Stage:
    """Build one stage of the plan; stage 0 also holds the embedding, the final norm and the head."""
    first, last = plan.stages[stage].layers
    built = build_stage(
        config,
        first,
        last,
        with_embedding_and_head=stage == 0,
        seed=seed,
        device=options.device,
        dtype=options.dtype,
        lora=options.lora,
    )
    compiled_for = options.wire.shape if options.compile else None
    make_ready(built, options.activation_checkpointing, options.device, compiled_for)
    return built
