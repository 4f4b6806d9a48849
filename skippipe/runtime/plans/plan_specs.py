"""Which plans a recipe asks for beside the main one: their names, the rules of their routes, their seeds."""

from dataclasses import dataclass

from skippipe.config.experiment import Experiment
from skippipe.runtime.plans.plan_set import MAIN_PLAN
from skippipe.runtime.plans.route_rules import full_depth_rules, route_rules
from skippipe_scheduler.problem.rules import Rules

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
    pipeline = experiment.pipeline
    rules = [route_rules(pipeline), *(route_rules(pipeline, phase) for phase in phases)]
    names = [MAIN_PLAN, *(f"phase-{number}" for number in range(1, len(rules)))]
    return [names[rules.index(rules_of_phase)] for rules_of_phase in rules[1:]]


def plan_specs_of(experiment: Experiment) -> dict[str, PlanSpec]:
    """Return the plans that the recipe needs beside the main one, by name."""
    recipe, pipeline = experiment.recipe, experiment.pipeline
    seed = pipeline.planner.seed
    wanted: dict[str, PlanSpec] = {}
    for kind, phase in zip(plan_kinds_of_phases(experiment), recipe.depth_curriculum or (None,), strict=True):
        for draw in range(recipe.redrawn_routes):
            name = draw_name(kind, draw)
            if name != MAIN_PLAN and name not in wanted:
                wanted[name] = PlanSpec(route_rules(pipeline, phase), seed + draw * SEED_STRIDE)
    if recipe.full_depth_interval is not None:
        wanted[FULL_DEPTH] = PlanSpec(full_depth_rules(pipeline), seed)
    return wanted
