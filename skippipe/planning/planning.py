"""From an experiment to a plan: the model's cost, the cluster's links and the scheduler, brought together."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from skippipe.config.experiment import Experiment
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.problem.build import Layers, OpenLayers, build_problem
from skippipe_scheduler.problem.cluster import Cluster, load_cluster
from skippipe_scheduler.problem.problem import Problem
from skippipe_scheduler.problem.workload import Workload

if TYPE_CHECKING:
    from skippipe_scheduler.solve.solve import SolveOptions

BUCKET_BYTES = 12 * 2**20
"""Gradients that are on their way at a time (`skippipe.runtime.gradients.reduction`: three buckets of 4 MiB)."""

MESSAGES_PER_RECEIVE = 2
"""Room that is set aside for messages, as a multiple of the receive window: as many again that wait to be sent."""

OPTIMIZER_BYTES = 8
"""AdamW keeps two fp32 moments for every parameter."""

Sizes = Literal["given", "rule", "auto"]
"""Who chooses the replicas of each stage: the user, the rule of equal work, or the planner."""

POSITION_KEYS = {"max_position_embeddings", "n_positions"}
"""What architectures call the longest context that the model knows."""


@dataclass(frozen=True)
class PlanWithBaselines:
    """A plan, and what the same nodes do without our choices; baselines are solved with the same budget."""

    problem: Problem
    plan: Plan
    full_pipeline: Plan
    network_blind: Plan

    @property
    def baselines(self) -> dict[str, Plan]:
        """The baselines by the name under which tables show them."""
        return {"full pipeline": self.full_pipeline, "network-blind skipping": self.network_blind}


def experiment_workload(experiment: Experiment) -> Workload:
    """Return what one microbatch costs in FLOP and bytes; the model is built on the meta device only."""
    import torch

    from skippipe.model.cost import model_cost
    from skippipe.model.device import uses_cuda
    from skippipe.runtime.transport.wire import Wire

    training = experiment.training
    dtype = getattr(torch, training.dtype)
    shape = (training.micro_batch_size, training.sequence_length)
    model = experiment_model(experiment)
    cost = model_cost(model, *shape, dtype, training.activation_checkpointing)
    sent = getattr(torch, experiment.comm.activation_dtype or training.dtype)
    own_bytes, optimizer_bytes = _state_bytes(experiment, dtype.itemsize)
    sharded = experiment.optimizer.backend != "replicated"
    splits = experiment.pipeline.split_backward
    kept_bytes = optimizer_bytes if not sharded else 0
    activation_bytes = Wire((*shape, model.hidden_size), sent, experiment.comm.activation_compression).size_bytes
    # Messages and the copy for a checkpoint lie in host memory, which is the node's own where it has no GPU.
    on_host = not uses_cuda(training.device)
    copied_bytes = dtype.itemsize + kept_bytes if on_host else 0
    window = min(experiment.comm.receive_window, training.num_microbatches)
    update_bytes = 4 if dtype.itemsize < 4 else 0  # fp32 gradients for the master copies
    return Workload(
        num_layers=cost.num_layers,
        layer_forward_flop=cost.layer_forward_flop,
        loss_flop=cost.loss_flop * experiment.recipe.num_losses,
        activation_bytes=activation_bytes,
        layer_gradient_bytes=_gradient_bytes(experiment, cost.layer_shapes) // cost.num_layers,
        ends_gradient_bytes=_gradient_bytes(experiment, cost.ends_shapes),
        layer_state_bytes=cost.layer_parameters * (own_bytes + kept_bytes),
        # The embedding is one tensor, which one replica keeps whole.
        ends_state_bytes=cost.ends_parameters * (own_bytes + optimizer_bytes),
        layer_shared_bytes=cost.layer_parameters * optimizer_bytes if sharded else 0,
        # Between its input and its weight gradient a microbatch may hold more than what was kept for its backward.
        layer_resident_bytes=max(cost.layer_resident_bytes, cost.weight_resident_bytes if splits else 0),
        stage_resident_bytes=cost.stage_resident_bytes,
        # The gradient of an early exit waits for the origin's backward.
        ends_resident_bytes=cost.ends_resident_bytes + (experiment.recipe.num_losses - 1) * cost.activation_bytes,
        working_bytes=cost.working_bytes,
        ends_working_bytes=cost.ends_working_bytes,
        message_bytes=MESSAGES_PER_RECEIVE * window * activation_bytes if on_host else 0,
        layer_copy_bytes=cost.layer_parameters * copied_bytes,
        ends_copy_bytes=cost.ends_parameters * (dtype.itemsize + optimizer_bytes) if on_host else 0,
        layer_update_bytes=cost.layer_parameters * update_bytes,
        ends_update_bytes=cost.ends_parameters * update_bytes,
        bucket_bytes=BUCKET_BYTES,
        backward_to_forward=cost.backward_to_forward,
        weight_share=cost.weight_to_forward / cost.backward_to_forward if splits else 0.0,
    )


def _gradient_bytes(experiment: Experiment, shapes: Sequence[tuple[int, ...]]) -> int:
    """Return in how many bytes gradients of these shapes travel."""
    import torch

    from skippipe.runtime.gradients.compression import int8_gradient_bytes, powersgd_gradient_bytes

    comm = experiment.comm
    numbers = sum(math.prod(shape) for shape in shapes)
    if comm.gradient_compression == "int8":
        return int8_gradient_bytes(numbers)
    if comm.gradient_compression == "powersgd":
        return powersgd_gradient_bytes(shapes, comm.powersgd.rank)
    itemsize: int = getattr(torch, comm.gradient_dtype or experiment.training.dtype).itemsize
    return numbers * itemsize


def _state_bytes(experiment: Experiment, itemsize: int) -> tuple[int, int]:
    """Return the bytes for each parameter that every replica holds, and those of the optimizer.

    Parameter and gradient in the run's dtype, and in fp32 what compressed sums left out; two moments and (for bfloat16,
    and always with DeepSpeed) a master copy in fp32. With offload a GPU holds nothing of the optimizer.
    """
    from skippipe.model.device import uses_cuda

    options, comm = experiment.optimizer, experiment.comm
    remembered = 4 if comm.gradient_compression != "none" and comm.error_feedback else 0
    has_master = itemsize < 4 or options.backend.startswith("deepspeed")
    held_here = not (options.offload and uses_cuda(experiment.training.device))
    return 2 * itemsize + remembered, (OPTIMIZER_BYTES + 4 * has_master) * held_here


def experiment_model(experiment: Experiment):  # type: ignore[no-untyped-def]  # transformers has no types
    """Return the Hugging Face configuration of the experiment's model, its vocabulary that of the tokenizer."""
    from skippipe.data.tokenizer import vocabulary_size
    from skippipe.model.architecture import build_config, config_from_directory

    if experiment.model.directory is not None:
        return config_from_directory(Path(experiment.model.directory))
    options = dict(experiment.model.options)
    options.setdefault("vocab_size", vocabulary_size(experiment.data))
    if not POSITION_KEYS & options.keys():
        options["max_position_embeddings"] = max(2048, experiment.training.sequence_length)
    return build_config(experiment.model.architecture, options)


def experiment_problem(experiment: Experiment) -> Problem | OpenLayers:
    """Return the scheduling problem that the experiment and its cluster pose, with open layers where these are auto."""
    cluster, workload = load_cluster(Path(experiment.cluster)), experiment_workload(experiment)
    given = experiment.pipeline.layers_per_stage
    if given == "auto":
        num_stages = experiment.pipeline.num_stages
        return OpenLayers(workload.num_layers, num_stages, partial(_posed, experiment, cluster, workload))
    return _posed(experiment, cluster, workload, given)


def _posed(experiment: Experiment, cluster: Cluster, workload: Workload, layers: Layers | None) -> Problem:
    pipeline = experiment.pipeline
    return build_problem(
        cluster,
        workload,
        num_stages=pipeline.num_stages,
        skip_ratio=pipeline.skip_ratio,
        route_lengths=pipeline.route_lengths,
        free_origins=pipeline.microbatches_per_origin == "auto",
        layers_per_stage=layers,
        stage_sizes=pipeline.stage_sizes,
        placement=pipeline.placement,
        pinned=pipeline.pinned,
        num_microbatches=experiment.training.num_microbatches,
        max_swaps=pipeline.max_swaps,
        max_swap_distance=pipeline.max_swap_distance,
        max_forward_jump=pipeline.max_forward_jump,
        uniform_coverage=pipeline.uniform_coverage,
        protected_stages=pipeline.protected_stages,
        reduction=pipeline.reduction,
    )


def experiment_options(experiment: Experiment) -> "SolveOptions":
    """Return the planner's budget and seed as the experiment gives them."""
    from skippipe_scheduler.options import Robustness, SolveOptions

    planner = experiment.pipeline.planner
    return SolveOptions(
        time_limit_s=planner.time_limit_s,
        seed=planner.seed,
        max_evaluations=planner.max_evaluations,
        robustness=Robustness(planner.jitter_sigma) if planner.jitter_sigma else None,
    )


def experiment_sizes(experiment: Experiment) -> Sizes:
    """Return who chooses how many replicas stages have."""
    given = experiment.pipeline.stage_sizes
    return "auto" if given == "auto" else "rule" if given is None else "given"


def plan_problem(
    problem: Problem | OpenLayers, options: "SolveOptions", *, sizes: Sizes = "given", warm: Plan | None = None
) -> Plan:
    """Solve one problem; open layers are chosen first, within the same budget.

    The search begins at the plan `warm` where it is given, with its layers and sizes where these are open. Without
    skipping, and with sizes by rule or open, all even sizes are tried.
    """
    from skippipe_scheduler.solve.replan import replan

    if warm is None:
        return _solve_variants(problem, options, partial(_variants, sizes=sizes))
    return replan(warm, posed(problem, warm, sizes=sizes), options)


def posed(problem: Problem | OpenLayers, plan: Plan, *, sizes: Sizes = "given") -> Problem:
    """Return the problem with layers and sizes of `plan` where they are open; raises `ProblemError` where its layers do
    not fit.
    """
    if isinstance(problem, OpenLayers):
        problem = problem.pose(plan.layers_per_stage)
    held = tuple(len(stage.nodes) for stage in plan.stages)
    fits = len(held) == problem.num_stages and sum(held) == len(problem.nodes)
    return problem.model_copy(update={"stage_sizes": held}) if sizes == "auto" and fits else problem


def _variants(problem: Problem, *, sizes: Sizes) -> list[Problem]:
    from skippipe_scheduler.baselines.full_and_blind import full_pipeline_problem
    from skippipe_scheduler.problem.stage_sizes import size_variants

    if sizes == "given" or problem.stages is not None:
        return [problem]
    if problem.rules.lengths == (problem.num_stages,):
        return full_pipeline_problem(problem, sizes_by_memory=sizes == "auto")
    return size_variants(problem) if sizes == "auto" else [problem]


def _solve_variants(
    problem: Problem | OpenLayers, options: "SolveOptions", variants: Callable[[Problem], list[Problem]]
) -> Plan:
    from skippipe_scheduler.solve.layer_split import choose_layers
    from skippipe_scheduler.solve.solve import solve_variants

    if isinstance(problem, OpenLayers):
        problem, options = choose_layers(problem, options, variants)
    return solve_variants(variants(problem), options)


def plan_experiment(experiment: Experiment) -> Plan:
    """Solve the experiment's plan, with the whole time limit for it and no baselines."""
    problem = experiment_problem(experiment)
    return plan_problem(problem, experiment_options(experiment), sizes=experiment_sizes(experiment))


def plan_with_baselines(
    problem: Problem | OpenLayers,
    options: "SolveOptions",
    *,
    sizes: Sizes = "given",
    warm: Plan | None = None,
    announce: Callable[[str], None] = lambda title: None,
) -> PlanWithBaselines:
    """Solve the problem and both baselines, each with a third of the time limit.

    The plan's search begins at `warm` where it is given. Open layers are chosen for the plan and for the full pipeline,
    each within its third; network-blind skipping gets those of the plan. `announce` is called with the name of each
    solve before it starts.
    """
    from skippipe_scheduler.baselines.full_and_blind import full_pipeline_problem
    from skippipe_scheduler.solve.solve import solve_network_blind

    third = replace(options, time_limit_s=options.time_limit_s / 3)
    announce("this plan")
    plan = plan_problem(problem, third, sizes=sizes, warm=warm)
    announce("full pipeline")
    full_variants = partial(full_pipeline_problem, sizes_by_memory=sizes == "auto")
    full_pipeline = _solve_variants(problem, third, full_variants)
    announce("network-blind skipping")
    chosen = posed(problem, plan, sizes=sizes)
    blind = solve_network_blind(chosen, third, stages=tuple(stage.nodes for stage in plan.stages))
    return PlanWithBaselines(chosen, plan, full_pipeline, blind)
