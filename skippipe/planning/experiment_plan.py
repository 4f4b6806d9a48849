"""The plan of an experiment or a problem, alone or with the baselines beside it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from skippipe.config.experiment import Experiment
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.problem.build import LayerSplitProblem
from skippipe_scheduler.problem.problem import Problem

if TYPE_CHECKING:
    from skippipe_scheduler.solver.solve import SolveOptions
from skippipe.planning.experiment_problem import (
    StageSizeSource,
    experiment_options,
    experiment_problem,
    experiment_stage_size_source,
)


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


def plan_problem(
    problem: Problem | LayerSplitProblem,
    options: "SolveOptions",
    *,
    sizes: StageSizeSource = "given",
    warm: Plan | None = None,
) -> Plan:
    """Solve one problem; open layers are chosen first, within the same budget.

    The search begins at the plan `warm` where it is given, with its layers and sizes where these are open. Without
    skipping, and with sizes by rule or open, all even sizes are tried.
    """
    from skippipe_scheduler.solver.replan import replan

    if warm is None:
        return _solve_variants(problem, options, partial(_variants, sizes=sizes))
    return replan(warm, posed(problem, warm, sizes=sizes), options)


def posed(problem: Problem | LayerSplitProblem, plan: Plan, *, sizes: StageSizeSource = "given") -> Problem:
    """Return the problem with layers and sizes of `plan` where they are open; raises `ProblemError` where its layers do
    not fit.
    """
    if isinstance(problem, LayerSplitProblem):
        problem = problem.pose(plan.layers_per_stage)
    held = tuple(len(stage.nodes) for stage in plan.stages)
    fits = len(held) == problem.num_stages and sum(held) == len(problem.nodes)
    return problem.model_copy(update={"stage_sizes": held}) if sizes == "auto" and fits else problem


def _variants(problem: Problem, *, sizes: StageSizeSource) -> list[Problem]:
    from skippipe_scheduler.baselines.full_and_blind import full_pipeline_problem
    from skippipe_scheduler.problem.stage_sizes import size_variants

    if sizes == "given" or problem.stages is not None:
        return [problem]
    if problem.rules.lengths == (problem.num_stages,):
        return full_pipeline_problem(problem, sizes_by_memory=sizes == "auto")
    return size_variants(problem) if sizes == "auto" else [problem]


def _solve_variants(
    problem: Problem | LayerSplitProblem, options: "SolveOptions", variants: Callable[[Problem], list[Problem]]
) -> Plan:
    from skippipe_scheduler.solver.layer_split import choose_layers
    from skippipe_scheduler.solver.solve import solve_variants

    if isinstance(problem, LayerSplitProblem):
        problem, options = choose_layers(problem, options, variants)
    return solve_variants(variants(problem), options)


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
    problem = experiment_problem(experiment)
    return plan_problem(problem, experiment_options(experiment), sizes=experiment_stage_size_source(experiment))


def plan_with_baselines(
    problem: Problem | LayerSplitProblem,
    options: "SolveOptions",
    *,
    sizes: StageSizeSource = "given",
    warm: Plan | None = None,
    announce: Callable[[str], None] = lambda title: None,
) -> PlanWithBaselines:
    """Solve the problem and both baselines, each with a third of the time limit.

    The plan's search begins at `warm` where it is given. Open layers are chosen for the plan and for the full pipeline,
    each within its third; network-blind skipping gets those of the plan. `announce` is called with the name of each
    solve before it starts.
    """
    from skippipe_scheduler.baselines.full_and_blind import full_pipeline_problem
    from skippipe_scheduler.solver.solve import solve_network_blind

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
