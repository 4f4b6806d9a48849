"""Plans in which two nodes have changed places: one takes over a stage, and one that is lost gets its place."""

from functools import cached_property

from skippipe.config.experiment import Experiment
from skippipe.planning.experiment_cluster import experiment_cluster
from skippipe.planning.workload.experiment_workload import experiment_workload
from skippipe.runtime.plans.plan_set import MAIN_PLAN, PlanSet
from skippipe_scheduler.options import SolveOptions
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.problem.build import build_problem
from skippipe_scheduler.problem.cluster import Cluster
from skippipe_scheduler.problem.stage_layout import StageLayout
from skippipe_scheduler.problem.workload import Workload


class MovedNodes:
    """Makes the plans of an experiment in which nodes hold other stages, at the costs that they have there."""

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment

    def swapped(self, plans: PlanSet, one: str, other: str) -> PlanSet:
        """Return the plans of all nodes in which two of them have changed places.

        Microbatches keep their numbers, and their routes as far as these do not meet the two. Raises `InfeasibleError`
        where one of them cannot hold its new stage, and `ProblemError` where the cluster is not that of the plans.
        """
        found = {name: self._swapped(plan, one, other) for name, plan in plans.items()}
        return PlanSet(found.pop(MAIN_PLAN), found).in_rank_order(plans.main.nodes).at_pace(plans.pace, plans.link_pace)

    def _swapped(self, plan: Plan, one: str, other: str) -> Plan:
        # The search loads OR-tools and numba, about a second: one rank of a run needs it, and only when nodes are lost.
        from skippipe_scheduler.solver.replan import replan

        place_of = {one: other, other: one}
        problem = build_problem(
            self._cluster,
            self._workload,
            plan.rules,
            num_microbatches=len(plan.microbatches),
            layout=StageLayout(
                layers_per_stage=plan.layers_per_stage,
                placement=[[place_of.get(node, node) for node in stage.nodes] for stage in plan.stages],
            ),
            free_origins=self._experiment.pipeline.microbatches_per_origin == "auto",
            reduction=self._experiment.pipeline.reduction,
        )
        return replan(plan, problem, SolveOptions(time_limit_s=0.0, seed=plan.solver.seed))

    @cached_property
    def _cluster(self) -> Cluster:
        return experiment_cluster(self._experiment)

    @cached_property
    def _workload(self) -> Workload:
        return experiment_workload(self._experiment)
