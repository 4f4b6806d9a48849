"""The scheduling problem that an experiment and its cluster pose, and how long the planner may search."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from skippipe.config.experiment import Experiment
from skippipe_scheduler.problem.build import LayersPerStage, LayerSplitProblem, build_problem
from skippipe_scheduler.problem.cluster import Cluster, load_cluster
from skippipe_scheduler.problem.problem import Problem
from skippipe_scheduler.problem.workload import Workload

if TYPE_CHECKING:
    from skippipe_scheduler.solver.solve import SolveOptions
from skippipe.planning.experiment_workload import experiment_workload

StageSizeSource = Literal["given", "rule", "auto"]
"""Who chooses the replicas of each stage: the user, the rule of equal work, or the planner."""


def experiment_problem(experiment: Experiment) -> Problem | LayerSplitProblem:
    """Return the scheduling problem that the experiment and its cluster pose, with open layers where these are auto."""
    cluster, workload = load_cluster(Path(experiment.cluster)), experiment_workload(experiment)
    given = experiment.pipeline.layers_per_stage
    if given == "auto":
        num_stages = experiment.pipeline.num_stages
        return LayerSplitProblem(workload.num_layers, num_stages, partial(_posed, experiment, cluster, workload))
    return _posed(experiment, cluster, workload, given)


def _posed(experiment: Experiment, cluster: Cluster, workload: Workload, layers: LayersPerStage | None) -> Problem:
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


def experiment_stage_size_source(experiment: Experiment) -> StageSizeSource:
    """Return who chooses how many replicas stages have."""
    given = experiment.pipeline.stage_sizes
    return "auto" if given == "auto" else "rule" if given is None else "given"
