"""What would make iterations shorter: changes of an experiment, each tried out from the plan that there is."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from time import perf_counter
from typing import NamedTuple

from skippipe.config.experiment import Experiment
from skippipe.errors import SkipPipeError
from skippipe.planning.experiment_plan import plan_request
from skippipe.planning.workload.changed_experiment import Changes, changed, in_words, is_possible
from skippipe_scheduler.options import SolveOptions
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.problem.problem import Problem

MOST_SHOWN = 3
LEAST_GAIN = 0.01
"""Share of the iteration below which a change is not worth naming: short searches differ by as much."""
SEARCHED_ANEW = {"pipeline.stage_sizes", "pipeline.layers_per_stage", "training.num_microbatches"}
"""Keys with another value of which the plan that there is cannot be gone on from."""
NOT_TRIED = "What would help: not tried, as changes are searched without relays, and this plan has them."
MEMORY = "memory for all microbatches on every node"


class TriedChange(NamedTuple):
    """A change, and the iteration of the plan that was found with it, for as many samples as now."""

    words: str
    iteration_s: float


def what_helps(experiment: Experiment, plan: Plan, problem: Problem, limit_s: float) -> str:
    """Return in words which changes would shorten an iteration most.

    Args:
        experiment: What is planned.
        plan: Its plan, from which every change is tried.
        problem: What the plan is one of.
        limit_s: Seconds for all searches together. A budget of steps in the experiment is shared out instead.
    """
    if plan.has_relays:
        return NOT_TRIED
    tries = _tries(experiment, plan, problem)
    options = _part_of(experiment, limit_s, len(tries) + 1)
    now_s, begin_s = _replanned_s(plan, problem, options), perf_counter()
    found: list[TriedChange] = []
    for words, search in tries.items():
        if options.max_evaluations is None and perf_counter() - begin_s > limit_s:
            break
        try:
            found.append(TriedChange(words, search(options)))
        except SkipPipeError:
            continue  # no plan obeys it
    return _table(now_s, found)


def _tries(experiment: Experiment, plan: Plan, problem: Problem) -> Mapping[str, Callable[[SolveOptions], float]]:
    """Return for each change, in words, what finds the iteration with it."""
    tries: dict[str, Callable[[SolveOptions], float]] = {}
    for changes in _changes(experiment, problem):
        if is_possible(experiment, changes):
            tries[in_words(changes)] = _Search(experiment, changes, plan)
    memory = problem.costs.memory
    if min(memory.values()) < problem.num_microbatches:
        costs = problem.costs.model_copy(update={"memory": dict.fromkeys(memory, problem.num_microbatches)})
        roomy = problem.model_copy(update={"costs": costs})
        tries[MEMORY] = lambda options: _replanned_s(plan, roomy, options)
    return tries


def _changes(experiment: Experiment, problem: Problem) -> Iterator[Changes]:
    """Yield what the experiment has not done yet."""
    comm, pipeline, training = experiment.comm, experiment.pipeline, experiment.training
    for kind in ("gradient", "activation"):
        if getattr(comm, f"{kind}_compression") == "none":
            own_dtype = getattr(comm, f"{kind}_dtype") is not None
            dtype: Changes = {f"comm.{kind}_dtype": None} if own_dtype else {}
            yield {f"comm.{kind}_compression": "int8", **dtype}
    if pipeline.reduction != "hierarchical" and len(set(problem.regions or ())) > 1:
        yield {"pipeline.reduction": "hierarchical"}
    if pipeline.placement is None and pipeline.stage_sizes != "auto":
        yield {"pipeline.stage_sizes": "auto"}
    if pipeline.layers_per_stage != "auto":
        yield {"pipeline.layers_per_stage": "auto"}
    if pipeline.microbatches_per_origin != "auto":
        yield {"pipeline.microbatches_per_origin": "auto"}
    if not pipeline.split_backward:
        yield {"pipeline.split_backward": True}
    yield {"training.num_microbatches": 2 * training.num_microbatches}


@dataclass(frozen=True)
class _Search:
    """Finds the iteration of a changed experiment."""

    experiment: Experiment
    changes: Changes
    plan: Plan

    def __call__(self, options: SolveOptions) -> float:
        from skippipe_scheduler.solver.planner import search_request

        other = changed(self.experiment, self.changes)
        request = replace(plan_request(other, quiet=True), options=options)
        as_many = self.experiment.training.num_microbatches / other.training.num_microbatches
        if SEARCHED_ANEW.isdisjoint(self.changes):
            return as_many * _replanned_s(self.plan, request.resolve(self.plan), options)
        return as_many * search_request(request).predicted.iteration_s


def _replanned_s(plan: Plan, problem: Problem, options: SolveOptions) -> float:
    from skippipe_scheduler.solver.replan import replan

    return replan(plan, problem, options, layers=plan.layers_per_stage).predicted.iteration_s


def _part_of(experiment: Experiment, limit_s: float, parts: int) -> SolveOptions:
    planner = experiment.pipeline.planner
    steps = None if planner.max_evaluations is None else max(1, planner.max_evaluations // parts)
    return SolveOptions(time_limit_s=limit_s / parts, seed=planner.seed, max_evaluations=steps)


def _table(now_s: float, found: list[TriedChange]) -> str:
    helpful = sorted(
        (change for change in found if change.iteration_s < (1 - LEAST_GAIN) * now_s),
        key=lambda change: change.iteration_s,
    )[:MOST_SHOWN]
    if not helpful:
        tried = ", ".join(change.words for change in found) or "nothing"
        return f"What would help: nothing of what was tried shortens it by {LEAST_GAIN:.0%} or more ({tried})."
    lines = [f"What would help most, tried for as many samples, beside {now_s:.4f} s with nothing changed:"]
    lines += [
        f"  {change.words}: {change.iteration_s:.4f} s, {now_s - change.iteration_s:.4f} s less" for change in helpful
    ]
    return "\n".join(lines)
