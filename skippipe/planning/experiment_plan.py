"""What an experiment asks of the planner, and the plan that it gets."""

import logging
from collections.abc import Callable
from functools import partial

from skippipe.config.experiment import Experiment, PipelineOptions
from skippipe.planning.experiment_cluster import experiment_cluster
from skippipe.planning.workload.experiment_workload import experiment_workload
from skippipe.planning.workload.lighter_workloads import lighter_workloads
from skippipe.runtime.plans.route_rules import route_rules
from skippipe_scheduler.options import Robustness, SolveOptions
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.problem.build import LayersPerStage, LayerSplitProblem, build_problem, doubts_about_times
from skippipe_scheduler.problem.problem import Problem
from skippipe_scheduler.problem.stage_layout import StageLayout, StageSizesChoice
from skippipe_scheduler.solver.plan_request import PlanRequest, StageSizeSource

logger = logging.getLogger(__name__)


def plan_experiment(experiment: Experiment) -> Plan:
    """Solve the plan of an experiment on its cluster.

    Args:
        experiment: What to plan; `pipeline.planner` says how long and from which seed the planner searches.

    Returns:
        The best plan found.

    Raises:
        InputError: The cluster file, the model or the experiment's rules do not fit together.
        InfeasibleError: No plan obeys all the rules, or a node cannot hold its stage.

    Examples:
        >>> plan = plan_experiment(experiment)
        >>> plan.layers_per_stage, plan.visits
        ((2, 2, 2), (4, 2, 2))
    """
    return solve_plan(plan_request(experiment))


def solve_plan(request: PlanRequest) -> Plan:
    """Solve what is asked."""
    # The solver loads OR-tools and numba, about a second: most ranks of a run receive their plan and never solve one.
    from skippipe_scheduler.solver.planner import solve_request

    return solve_request(request)


def plan_request(experiment: Experiment, *, quiet: bool = False) -> PlanRequest:
    """Return what the experiment and its cluster ask of the planner, with layers and sizes open where they are auto.

    The model is built on the meta device only. Says where the cluster's times are not the experiment's, unless it is to
    be `quiet`. Raises what reading the cluster and `build_problem` raise.
    """
    pipeline, with_sizes = experiment.pipeline, _problems(experiment, quiet=quiet)
    source = _stage_size_source(pipeline)
    is_open = source != "given" and pipeline.placement is None
    return PlanRequest(
        with_sizes(pipeline.stage_sizes),
        planner_options(experiment),
        source,
        with_sizes=with_sizes if is_open else None,
    )


def planner_options(experiment: Experiment) -> SolveOptions:
    """Return the planner's budget and seed as the experiment gives them."""
    planner = experiment.pipeline.planner
    return SolveOptions(
        time_limit_s=planner.time_limit_s,
        seed=planner.seed,
        max_evaluations=planner.max_evaluations,
        robustness=Robustness(planner.jitter_sigma) if planner.jitter_sigma else None,
    )


def _problems(
    experiment: Experiment, *, quiet: bool
) -> Callable[[StageSizesChoice | None], Problem | LayerSplitProblem]:
    """Return what makes the problem of an experiment with given, open or even stage sizes."""
    cluster, workload = experiment_cluster(experiment), experiment_workload(experiment)
    lighter = lighter_workloads(experiment)
    pipeline = experiment.pipeline
    doubts = doubts_about_times(cluster, workload, pipeline.num_stages, experiment.training.dtype)
    for doubt in [] if quiet else doubts:
        logger.warning("%s: %s", experiment.cluster, doubt)

    def with_layers(stage_sizes: StageSizesChoice | None, layers: LayersPerStage | None) -> Problem:
        return build_problem(
            cluster,
            workload,
            route_rules(pipeline),
            num_microbatches=experiment.training.num_microbatches,
            layout=StageLayout(layers, stage_sizes, pipeline.placement, pipeline.pinned),
            free_origins=pipeline.microbatches_per_origin == "auto",
            reduction=pipeline.reduction,
            lighter=lighter,
        )

    def with_sizes(stage_sizes: StageSizesChoice | None) -> Problem | LayerSplitProblem:
        given = pipeline.layers_per_stage
        if given == "auto":
            return LayerSplitProblem(workload.num_layers, pipeline.num_stages, partial(with_layers, stage_sizes))
        return with_layers(stage_sizes, given)

    return with_sizes


def _stage_size_source(pipeline: PipelineOptions) -> StageSizeSource:
    given = pipeline.stage_sizes
    return "auto" if given == "auto" else "rule" if given is None else "given"
