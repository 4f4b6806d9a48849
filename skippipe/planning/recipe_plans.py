"""The plans that a recipe needs beside the main one: kept in RUN/plans, solved on its placement where they are not."""

import logging
from dataclasses import replace
from pathlib import Path

from skippipe.config.experiment import Experiment
from skippipe.errors import PlanError, SkipPipeError
from skippipe.planning.experiment_plan import planner_options, solve_plan
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.runtime.plans.plan_specs import plan_specs_of
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.validate import load_plan
from skippipe_scheduler.solver.other_routes import other_routes_request, route_distance
from skippipe_scheduler.solver.plan_request import PlanRequest

logger = logging.getLogger(__name__)

FOLDER = "plans"
MUCH_SLOWER = 1.1
"""A draw of the same kind that takes so many times as long as the fastest is worth a warning."""


def load_or_solve_recipe_plans(experiment: Experiment, main: Plan) -> PlanSet:
    """Return the main plan with the further ones that the recipe needs; new ones are written beside it.

    Those that are there already are replaced when the run begins. What is solved shares one more time limit of the
    planner. Raises what solving raises, naming the plan.
    """
    if experiment.recipe.needs_further_plans and experiment.pipeline.num_stages != len(main.stages):
        raise PlanError(
            f"the plan has {len(main.stages)} stages, pipeline.num_stages is {experiment.pipeline.num_stages}; make "
            "them equal: the recipe's further plans are made on its placement"
        )
    requests = _requests(experiment, main)
    kept = {name: _kept(_path(experiment, name), main, request) for name, request in requests.items()}
    missing = [name for name, plan in kept.items() if plan is None]
    if missing:
        logger.info("solving %d further plans of the recipe: %s", len(missing), ", ".join(missing))
    limit_s = experiment.pipeline.planner.time_limit_s / max(1, len(missing))
    solved = {name: _solve(name, requests[name].with_options(time_limit_s=limit_s)) for name in missing}
    plan_set = PlanSet(main, {name: plan or solved[name] for name, plan in kept.items()})
    for name, plan in solved.items():
        if not _path(experiment, name).exists():
            plan.save(_path(experiment, name))
    if experiment.recipe.redrawn_routes > 1:
        warn_of_draws(plan_set)
    return plan_set


def check_recipe_plans(experiment: Experiment, plans: PlanSet) -> None:
    """Raise `PlanError` where a plan that the recipe needs is not in the set."""
    missing = [name for name in plan_specs_of(experiment) if name not in plans.further]
    if missing:
        raise PlanError(
            f"the recipe needs the plan {missing[0]!r}, the run has {', '.join(map(repr, plans))}; make the set with "
            "skippipe.planning.sharing.share_plans"
        )


def save_recipe_plans(plans: PlanSet, run_dir: Path) -> None:
    """Write the further plans into the run directory."""
    for name, plan in plans.further.items():
        plan.save(run_dir / FOLDER / f"{name}.json")


def load_kept_plan(path: Path) -> Plan:
    """Return a plan that the run directory holds; raise `PlanError` with the remedy where it is damaged."""
    try:
        return load_plan(path)
    except PlanError as reason:
        raise PlanError(f"{reason}. Bring it back from a copy, or remove it to have it planned again") from None


def _path(experiment: Experiment, name: str) -> Path:
    return experiment.run_path / FOLDER / f"{name}.json"


def _requests(experiment: Experiment, main: Plan) -> dict[str, PlanRequest]:
    """Return what is asked of the planner for each plan that the recipe needs on the placement of `main`."""
    options = planner_options(experiment)
    free_origins = experiment.pipeline.microbatches_per_origin == "auto"
    return {
        name: other_routes_request(main, spec.rules, replace(options, seed=spec.seed), free_origins=free_origins)
        for name, spec in plan_specs_of(experiment).items()
    }


def _kept(path: Path, main: Plan, request: PlanRequest) -> Plan | None:
    """Return the plan of `path` where it is what is asked for beside `main`."""
    if not path.exists():
        return None
    plan = load_kept_plan(path)
    # More than a main plan has to share with its request: costs are those of `main`, task times included, and draws of
    # the same rules differ by their seeds.
    comparisons = {"costs": (plan.costs, main.costs), "seed": (plan.solver.seed, request.options.seed)}
    differences = (name for name, (stored, wanted) in comparisons.items() if stored != wanted)
    difference = request.difference_from(plan) or next(differences, None)
    if difference is not None:
        logger.warning("%s: made for other %s than this run's; solving a new plan", path, difference)
        return None
    return plan


def _solve(name: str, request: PlanRequest) -> Plan:
    try:
        return solve_plan(request)
    except SkipPipeError as reason:
        raise type(reason)(f"the recipe's plan {name!r}: {reason}") from None


def warn_of_draws(plans: PlanSet) -> None:
    """Say which plans of the same rules are much slower than the fastest, or have the same routes as another."""
    for name, plan in plans.items():
        alike = {other: candidate for other, candidate in plans.items() if candidate.rules == plan.rules}
        fastest_s = min(candidate.predicted.iteration_s for candidate in alike.values())
        if plan.predicted.iteration_s > MUCH_SLOWER * fastest_s:
            logger.warning(
                "plan %s takes %.3g s an iteration, the fastest of its kind %.3g s; give the planner more time "
                "(pipeline.planner.time_limit_s) or redraw fewer routes",
                name,
                plan.predicted.iteration_s,
                fastest_s,
            )
        same = next(
            (other for other, candidate in alike.items() if other < name and not route_distance(candidate, plan)), None
        )
        if same is not None:
            logger.warning("plans %s and %s have the same routes; redraw fewer", same, name)
