"""Which plans a recipe asks for beside the main one: their names, the rules of their routes, their seeds."""

from dataclasses import dataclass

from skippipe.config.experiment import Experiment
from skippipe.config.recipe_options import DepthPhase
from skippipe.plans.plan_set import MAIN_PLAN
from skippipe_scheduler.problem.rules import Rules
from skippipe_scheduler.problem.workload import route_length

FULL_DEPTH = "full-depth"
"""Name of the plan in which every microbatch visits every stage in order."""
SEED_STRIDE = 1000
"""Between the planner's seeds of two draws: more than the seeds that one search uses."""


@dataclass(frozen=True)
class PlanSpec:
    """A plan to be solved: the rules that it obeys and the planner's seed."""

    rules: Rules
    seed: int


def draw_name(kind: str, draw: int) -> str:
    """Return the name of a draw, counted from 0, among the plans of one kind: same rules, other seeds."""
    return kind if draw == 0 else f"{kind}-draw-{draw + 1}"


def plan_kinds_of_phases(experiment: Experiment) -> list[str]:
    """Return the kind of plan of every phase of training; one with the main plan's rules has the main plan's name."""
    phases = experiment.recipe.depth_curriculum
    if not phases:
        return [MAIN_PLAN]
    rules = [route_rules(experiment), *(route_rules(experiment, phase) for phase in phases)]
    names = [MAIN_PLAN, *(f"phase-{number}" for number in range(1, len(rules)))]
    return [names[rules.index(one)] for one in rules[1:]]


def plan_specs_of(experiment: Experiment) -> dict[str, PlanSpec]:
    """Return the plans that the recipe needs beside the main one, by name."""
    recipe, seed = experiment.recipe, experiment.pipeline.planner.seed
    wanted: dict[str, PlanSpec] = {}
    for kind, phase in zip(plan_kinds_of_phases(experiment), recipe.depth_curriculum or (None,), strict=True):
        for draw in range(recipe.redrawn_routes):
            name = draw_name(kind, draw)
            if name != MAIN_PLAN and name not in wanted:
                wanted[name] = PlanSpec(route_rules(experiment, phase), seed + draw * SEED_STRIDE)
    if recipe.full_depth_interval is not None:
        wanted[FULL_DEPTH] = PlanSpec(full_depth_rules(experiment), seed)
    return wanted


def route_rules(experiment: Experiment, phase: DepthPhase | None = None) -> Rules:
    """Return the rules of the experiment's routes, with the depth of a phase where one is given."""
    pipeline = experiment.pipeline
    skip_ratio, lengths, max_swaps = pipeline.skip_ratio, pipeline.route_lengths, pipeline.max_swaps
    if phase is not None:
        lengths = phase.route_lengths
        skip_ratio = skip_ratio if phase.skip_ratio is None else phase.skip_ratio
        max_swaps = max_swaps if phase.max_swaps is None else phase.max_swaps
    return Rules(
        num_stages=pipeline.num_stages,
        route_length=max(lengths) if lengths else route_length(pipeline.num_stages, skip_ratio),
        route_lengths=dict(lengths) if lengths else None,
        max_swaps=max_swaps,
        max_swap_distance=pipeline.max_swap_distance,
        max_forward_jump=pipeline.max_forward_jump,
        uniform_coverage=pipeline.uniform_coverage,
        protected_stages=pipeline.protected_stages,
    )


def full_depth_rules(experiment: Experiment) -> Rules:
    """Return the rules of the full pipeline."""
    num_stages = experiment.pipeline.num_stages
    return Rules(num_stages=num_stages, route_length=num_stages, max_swaps=0, max_swap_distance=0)
