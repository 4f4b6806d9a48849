"""From the pipeline section to the rules that routes obey: the one place that reads these keys for the planner."""

from skippipe.config.experiment import PipelineOptions
from skippipe.config.recipe_options import DepthPhase
from skippipe_scheduler.problem.rules import Rules, skip_rules


def route_rules(pipeline: PipelineOptions, phase: DepthPhase | None = None) -> Rules:
    """Return the rules of the experiment's routes, with the depth of a phase of training where one is given.

    Raises `ProblemError` where the keys do not fit together.
    """
    skip_ratio, lengths, max_swaps = pipeline.skip_ratio, pipeline.route_lengths, pipeline.max_swaps
    if phase is not None:
        lengths = phase.route_lengths
        skip_ratio = skip_ratio if phase.skip_ratio is None else phase.skip_ratio
        max_swaps = max_swaps if phase.max_swaps is None else phase.max_swaps
    return skip_rules(
        pipeline.num_stages,
        skip_ratio,
        route_lengths=lengths,
        max_swaps=max_swaps,
        max_swap_distance=pipeline.max_swap_distance,
        max_forward_jump=pipeline.max_forward_jump,
        uniform_coverage=pipeline.uniform_coverage,
        protected_stages=pipeline.protected_stages,
    )


def full_depth_rules(pipeline: PipelineOptions) -> Rules:
    """Return the rules of the full pipeline: every stage in order."""
    return skip_rules(pipeline.num_stages, max_swaps=0, max_swap_distance=0)
