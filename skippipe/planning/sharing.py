"""One set of plans for all ranks: rank 0 reads or solves it, the others receive its text through the store."""

import logging
from pathlib import Path

from skippipe.config.experiment import Experiment
from skippipe.planning.experiment_plan import plan_request, solve_plan
from skippipe.planning.recipe_plans import load_kept_plan, load_or_solve_recipe_plans
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.runtime.ranks.agreement import on_first_rank
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.store_names import Topic
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.validate import load_plan

logger = logging.getLogger(__name__)


def share_plans(experiment: Experiment, path: Path | None, context: DistributedContext) -> PlanSet:
    """Return the main plan and those that the recipe needs beside it, the same on every rank.

    The main plan is that of `path`, else the fitting one of the run directory, else a new one. Where rank 0 fails,
    every rank raises its error.
    """
    if context.store is None:
        return choose_plans(experiment, path)
    limit_s = context.timeout_s + 2 * experiment.pipeline.planner.time_limit_s  # main plan and recipe
    text = on_first_rank(context, Topic.PLANS, lambda: choose_plans(experiment, path).to_json(), limit_s=limit_s)
    return PlanSet.from_json(text)


def choose_plans(experiment: Experiment, path: Path | None) -> PlanSet:
    """Return the main plan (see `choose_plan`) with those that the recipe needs on its placement."""
    return load_or_solve_recipe_plans(experiment, choose_plan(experiment, path))


def choose_plan(experiment: Experiment, path: Path | None) -> Plan:
    """Return the plan of `path`, else RUN/plan.json where it fits the experiment, else solve one.

    It is kept there at once where there is none; one that is there is replaced when the run begins under the new one.
    """
    if path is not None:
        return load_plan(path)
    request = plan_request(experiment)
    kept = experiment.run_path / "plan.json"
    if kept.exists():
        plan = load_kept_plan(kept)
        difference = request.difference_from(plan)
        if difference is None:
            _warn_of_other_costs(kept, request.other_costs_of(plan))
            return plan
        logger.warning("%s: made for other %s than the experiment's; solving a new plan", kept, difference)
        return solve_plan(request)
    logger.info("solving a plan, at most %g s", request.options.time_limit_s)
    plan = solve_plan(request)
    plan.save(kept)
    return plan


def _warn_of_other_costs(kept: Path, costs: str | None) -> None:
    if costs is not None:
        logger.warning(
            "%s: made for other %s than the experiment's, and followed all the same, so that the run goes on as it "
            "began; remove it to have the run planned again",
            kept,
            costs,
        )
