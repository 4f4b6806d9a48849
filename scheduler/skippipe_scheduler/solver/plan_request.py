"""What is asked of the planner: a problem, what of it is still open, how to search, and where to begin."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from skippipe_scheduler.baselines.full_and_blind import as_full_pipeline, full_pipeline_problem, full_pipeline_rules
from skippipe_scheduler.errors import InfeasibleError, ProblemError
from skippipe_scheduler.options import SolveOptions
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.simulate import peak_held
from skippipe_scheduler.problem.build import LayersPerStage, LayerSplitProblem
from skippipe_scheduler.problem.problem import Problem
from skippipe_scheduler.problem.stage_layout import StageSizesChoice
from skippipe_scheduler.problem.stage_sizes import size_variants

StageSizeSource = Literal["given", "rule", "auto"]
"""Who chooses the replicas of each stage: the user, the rule of equal work, or the planner."""
_MOST_BY_REGION = 4
"""Choices of sizes by region that are tried. Chosen: of 20 for 8B on 100 nodes, the best were among the first six."""
_NODES_BY_REGION = 1200
"""Nodes of all problems together that are made for them. Chosen: one of 1,000 nodes takes 3 s to make."""


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
    with_sizes: Callable[[StageSizesChoice], Problem | LayerSplitProblem] | None = None
    """Makes the same with other sizes of stages, for sizes that nobody gives, which a plan may fall back on where they
    are better. Raises where pins or the nodes' memory do not allow them."""
    _made: dict[StageSizesChoice, Problem | LayerSplitProblem | None] = field(
        default_factory=dict, compare=False, repr=False
    )

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
        problem = self.even(layers)
        if problem is None or problem.rules.lengths == (problem.num_stages,):
            return self.full_pipelines_beside(layers)
        asked = self.problem
        is_asked = isinstance(asked, Problem) and asked.sizes == problem.sizes
        evens = [] if is_asked and len(set(problem.sizes)) == 1 else [problem]
        return [*evens, *self._by_region(problem, layers)]

    def full_pipelines_beside(self, layers: LayersPerStage | None) -> list[Problem]:
        """Return full pipelines that may be better than `full_pipelines`, with the layers that were chosen, if any."""
        even = self.even(layers)
        return [] if even is None else [as_full_pipeline(problem) for problem in self._by_region(even, layers)]

    def even(self, layers: LayersPerStage | None) -> Problem | None:
        """Return the problem with stages of even sizes, where nobody gives sizes and memory allows these."""
        return self._sized("even", layers)

    def _by_region(self, even: Problem, layers: LayersPerStage | None) -> list[Problem]:
        """Return variants of which each stage lies in one region."""
        from skippipe_scheduler.slots.region_groups import sizes_by_region

        most = max(1, min(_MOST_BY_REGION, _NODES_BY_REGION // len(even.nodes)))
        choices = sizes_by_region(even, most)
        found = [self._sized(sizes, layers) for sizes in choices if sizes != even.sizes]
        return [problem for problem in found if problem is not None]

    def _sized(self, sizes: StageSizesChoice, layers: LayersPerStage | None) -> Problem | None:
        if self.with_sizes is None:
            return None
        try:
            if sizes not in self._made:
                self._made[sizes] = None
                self._made[sizes] = self.with_sizes(sizes)
            made = self._made[sizes]
            return made.with_layers(layers or ()) if isinstance(made, LayerSplitProblem) else made
        except (InfeasibleError, ProblemError):
            return None

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
        layers = plan.layers_per_stage
        same = next((other for other in self.beside(layers) if other.sizes == held), None)
        if same is not None:
            return same
        even = self.even(layers) if max(held) - min(held) <= 1 else None
        if self.stage_size_source == "rule" and even is None:
            return problem
        return (even or problem).model_copy(update={"stage_sizes": held})

    def difference_from(self, plan: Plan) -> str | None:
        """Return the first thing for which `plan` is no plan of what is asked for, or None: what is open never is.

        Nor are task times and memory that the plan does not need (`other_costs_of`): it would only be slower.
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
        difference = next((name for name, (stored, wanted) in comparisons.items() if stored != wanted), None)
        if difference is not None:
            return difference
        memory = problem.costs.memory
        return "memory" if any(peak_held(plan.order[node]) > memory[node] for node in plan.nodes) else None

    def other_costs_of(self, plan: Plan) -> str | None:
        """Return which costs of a plan that has no `difference_from` this request are not those asked for, or None.

        Its routes and order can be run all the same; another plan may be faster.
        """
        problem = self.resolve(plan)
        given, wanted, weight = plan.costs, problem.costs, problem.stage_weight
        at_stage = {node: weight[stage] for node, stage in plan.stage_of.items()}
        comparisons: dict[str, list[tuple[object, object]]] = {
            "task times": [
                (given.forward_s, {node: wanted.forward_s[node] * share for node, share in at_stage.items()}),
                (given.backward_s, {node: wanted.backward_s[node] * share for node, share in at_stage.items()}),
                (given.loss_s, {node: wanted.loss_s[node] for node in given.loss_s}),
                (given.task_overhead_s, wanted.task_overhead_s),
            ],
            "memory": [(given.memory, wanted.memory)],
        }
        return next((name for name, pairs in comparisons.items() if any(old != new for old, new in pairs)), None)
