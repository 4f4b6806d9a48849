"""What is asked of the planner: a problem, what of it is still open, how to search, and where to begin."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from skippipe_scheduler.baselines.full_and_blind import full_pipeline_problem, full_pipeline_rules
from skippipe_scheduler.errors import InfeasibleError
from skippipe_scheduler.options import SolveOptions
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.problem.build import LayersPerStage, LayerSplitProblem
from skippipe_scheduler.problem.problem import Problem
from skippipe_scheduler.problem.stage_sizes import size_variants

StageSizeSource = Literal["given", "rule", "auto"]
"""Who chooses the replicas of each stage: the user, the rule of equal work, or the planner."""


@dataclass(frozen=True)
class PlanRequest:
    """A plan that is wanted; `solve_request` solves it.

    Examples:
        >>> request = PlanRequest(problem, SolveOptions(max_evaluations=200))
        >>> request.difference_from(solve_request(request)) is None
        True
    """

    problem: Problem | LayerSplitProblem
    """What is to be planned; layers that are open are chosen first, within the same budget."""
    options: SolveOptions = field(default_factory=SolveOptions)
    stage_size_source: StageSizeSource = "given"
    """Who chooses the sizes of stages of a problem with a free placement."""
    warm: Plan | None = None
    """The plan at which the search begins; what the request leaves open is then as in this plan."""
    layers_per_stage: LayersPerStage | None = None
    """For the plan's file, where the problem does not say them because its task times count them already."""
    even: Problem | LayerSplitProblem | None = None
    """The same with stages of even sizes, for sizes that nobody gives: a plan may fall back on it where that is better.
    With each of these sizes its nodes can hold their microbatches."""

    def with_options(self, **changes: Any) -> "PlanRequest":
        """Return the request with some fields of its `SolveOptions` changed."""
        return replace(self, options=replace(self.options, **changes))

    def leaves_sizes_open(self, problem: Problem) -> bool:
        """Return whether nobody gives the replicas of each stage, nor the placement (`problem` has the layers)."""
        return self.stage_size_source != "given" and problem.stages is None

    def variants(self, problem: Problem) -> list[Problem]:
        """Return the problems of which the best plan is wanted, where `problem` has the layers that were chosen.

        Without skipping, and with sizes by rule or open, these have all even sizes.
        """
        if not self.leaves_sizes_open(problem):
            return [problem]
        if problem.rules.lengths == (problem.num_stages,):
            return self.full_pipelines(problem)
        return size_variants(problem) if self.stage_size_source == "auto" else [problem]

    def full_pipelines(self, problem: Problem) -> list[Problem]:
        """Return the full pipelines that the plan is compared with, where `problem` has the layers that were chosen."""
        return full_pipeline_problem(problem, sizes_by_memory=self.stage_size_source == "auto")

    def beside(self, layers: LayersPerStage | None) -> list[Problem]:
        """Return variants that a plan may fall back on beside `variants`, with the layers that were chosen, if any."""
        even = self.even
        if isinstance(even, LayerSplitProblem):
            try:
                even = even.with_layers(layers or ())
            except InfeasibleError:
                even = None
        problem = self.problem
        if even is None or even.rules.lengths == (even.num_stages,):
            return []
        same = isinstance(problem, Problem) and even.sizes == problem.sizes
        return [] if same and len(set(even.sizes)) == 1 else [even]

    def resolve(self, plan: Plan) -> Problem:
        """Return the problem with layers and sizes of `plan` where they are open.

        Raises `ProblemError` where its layers do not fit, `InfeasibleError` where a node cannot hold its stage.
        """
        problem = self.problem
        if isinstance(problem, LayerSplitProblem):
            problem = problem.with_layers(plan.layers_per_stage)
        held = tuple(len(stage.nodes) for stage in plan.stages)
        fits = len(held) == problem.num_stages and sum(held) == len(problem.nodes)
        if not fits or held == problem.sizes or self.stage_size_source == "given":
            return problem
        evens = self.beside(plan.layers_per_stage) if max(held) - min(held) <= 1 else []
        if self.stage_size_source == "rule" and not evens:
            return problem
        return (evens[0] if evens else problem).model_copy(update={"stage_sizes": held})

    def difference_from(self, plan: Plan) -> str | None:
        """Return the first thing in which `plan` differs from what is asked for, or None: what is open never does.

        Nor do task times: a plan has those of each node at its stage, a problem those of a stage of mean size.
        """
        problem, layers = self.problem, plan.layers_per_stage
        if isinstance(problem, LayerSplitProblem):
            if (len(layers), sum(layers)) != (problem.num_stages, problem.num_layers):
                return "layers"
            try:
                problem = problem.with_layers(layers)
            except InfeasibleError:
                return "memory"
        held = tuple(stage.nodes for stage in plan.stages)
        sizes = tuple(map(len, held))
        rules = problem.rules
        if rules.lengths == (problem.num_stages,) and plan.rules == full_pipeline_rules(rules):
            rules = plan.rules  # `variants` asks for that where nothing may be skipped
        comparisons = {
            "nodes": (plan.nodes, problem.nodes),
            "rules": (plan.rules, rules),
            "microbatches": (len(plan.microbatches), problem.num_microbatches),
            "layers": (layers, self.layers_per_stage or problem.stage_layers or layers),
            "placement": (held, held if problem.stages is None else tuple(stage.nodes for stage in problem.stages)),
            "pinned nodes": (plan.stage_of | (problem.pinned or {}), plan.stage_of),
            "stage sizes": (sizes, problem.sizes if self.stage_size_source == "given" else sizes),
            "links": (plan.costs.transfer_s, problem.costs.transfer_s),
            "contention": (plan.costs.contention, problem.costs.contention),
            "cards": (plan.costs.card_gbit_per_s, problem.costs.card_gbit_per_s),
            "uplinks": (plan.costs.uplinks, problem.costs.uplinks),
            "splits of backwards": (bool(plan.costs.weight_s), bool(problem.costs.weight_s)),
        }
        return next((name for name, (stored, wanted) in comparisons.items() if stored != wanted), None)
