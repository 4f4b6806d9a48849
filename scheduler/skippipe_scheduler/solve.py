"""Solving a problem: several starts, the best of them searched further, the joint model where it is small
enough.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version

from skippipe_scheduler.assemble import contended_s, finished_plan
from skippipe_scheduler.baselines import full_pipeline_problem, network_blind
from skippipe_scheduler.bounds import lower_bounds
from skippipe_scheduler.budget import Budget
from skippipe_scheduler.joint import improve_jointly
from skippipe_scheduler.order import build, retime
from skippipe_scheduler.placement import propose_placements
from skippipe_scheduler.plan import Plan, Solver
from skippipe_scheduler.problem import Problem, StageNodes
from skippipe_scheduler.routes import balanced_routes, choose_routes
from skippipe_scheduler.search import Judge, Progress, Search, State
from skippipe_scheduler.slots import Layout, SlotCosts

_MARGIN = 0.94
"""Share of the time limit that the search may use; the rest is for writing the plan down."""
_STARTS = 6
_ROUNDS_PART = 0.35


@dataclass(frozen=True)
class SolveOptions:
    """How long and how to search.

    With `max_evaluations` the clock is ignored: equal seeds then give equal plans (`wall_s` is recorded as
    0). `num_workers` is for CP-SAT; it uses one where the result must be repeatable.
    """

    time_limit_s: float = 10.0
    seed: int = 0
    max_evaluations: int | None = None
    num_workers: int = 2
    progress: Callable[[Progress], None] | None = None

    def budget(self) -> Budget:
        """Start the budget of a whole solve."""
        return Budget(self.time_limit_s * _MARGIN, self.max_evaluations)


@dataclass
class _Run:
    """One solve in progress."""

    options: SolveOptions
    budget: Budget
    bound_s: float
    best_s: float = float("inf")

    def report(self, state: State) -> None:
        """Tell the caller about an improvement."""
        if state.iteration_s < self.best_s:
            self.best_s = state.iteration_s
            if self.options.progress:
                progress = Progress(self.budget.elapsed_s, self.budget.spent, self.best_s, self.bound_s)
                self.options.progress(progress)


def solve(problem: Problem, options: SolveOptions, *, layers: Sequence[int] | None = None) -> Plan:
    """Return the best plan found for `problem` within `options`, with predicted times and a lower bound.

    `layers` is the number of layers of each stage (default: the problem's stage_layers, or one per stage).
    Raises `InfeasibleError` naming the rules that conflict, `ProblemError` where `layers` does not fit.
    """
    return _solve_best([problem], options, layers)


def solve_full_pipeline(problem: Problem, options: SolveOptions) -> Plan:
    """Return the best plan whose microbatches visit every stage in order, with its own best placement."""
    return _solve_best(full_pipeline_problem(problem), options, None)


def solve_network_blind(problem: Problem, options: SolveOptions, stages: Sequence[Sequence[str]] | None = None) -> Plan:
    """Return a plan whose routes were chosen as if all links and nodes were alike, timed with the true costs.

    The order is the better of the blind one and first-come insertions at the true costs, so that the plan
    cannot deadlock. `stages` fixes the placement, usually to that of the plan it is compared with.
    """
    fixed = _fix(problem, stages)
    budget = options.budget()
    if fixed.stages is None:
        proposed = propose_placements(Layout(fixed), 1, options.seed, budget.share(0.2))
        fixed = _fix(fixed, Layout(fixed).stages(proposed[0][0]))
    layout = Layout(fixed)
    balanced_routes(layout, 0)  # raises InfeasibleError before any time is spent
    unseen = replace(options, progress=None)  # times without a network would only mislead
    blind, _ = _search([Layout(network_blind(fixed))], unseen, budget.share(0.8))
    placement = layout.given_placement() or ()
    costs = SlotCosts(layout, placement)
    state = _dispatch(layout, costs, blind)
    return finished_plan(state, max(lower_bounds(fixed).values()), _solver(options, budget), None)


def _dispatch(layout: Layout, costs: SlotCosts, blind: State) -> State:
    """Return the better of the blind order itself and first-come insertions of its routes at the true `costs`."""
    first_come = sorted(range(len(blind.routes)), key=lambda one: blind.timeline.starts[one][0])
    waits_s = [factor * max(costs.backward_s) for factor in (1, 2, 4, 8, 16, 32)]
    timelines = [retime(costs, blind.routes, blind.timeline.starts)]
    timelines += [build(costs, blind.routes, first_come, wait_s) for wait_s in waits_s]
    search = Search(layout, 0, _judge(layout))
    return min((search.score(one, blind.routes) for one in timelines), key=lambda state: state.iteration_s)


def _judge(layout: Layout) -> Judge | None:
    return contended_s if layout.problem.costs.contention != "none" else None


def _fix(problem: Problem, stages: Sequence[Sequence[str]] | None) -> Problem:
    if stages is None:
        return problem
    update = {"stages": tuple(StageNodes(nodes=tuple(nodes)) for nodes in stages), "stage_sizes": None}
    return problem.model_copy(update=update)


def _solve_best(variants: list[Problem], options: SolveOptions, layers: Sequence[int] | None) -> Plan:
    budget = options.budget()
    layouts = [Layout(problem) for problem in variants]
    for layout in layouts:
        balanced_routes(layout, 0)  # raises InfeasibleError before any time is spent
    state, bound_s = _search(layouts, options, budget)
    return finished_plan(state, bound_s, _solver(options, budget), layers)


def _search(layouts: list[Layout], options: SolveOptions, budget: Budget) -> tuple[State, float]:
    """Return the best state over all `layouts` and a lower bound of the best of them."""
    run = _Run(options, budget, min(max(lower_bounds(layout.problem).values()) for layout in layouts))
    starts = [start for layout in layouts for start in _starts(layout, run, len(layouts))]
    starts.sort(key=lambda start: start[1].score)
    best = _race(starts, run)
    if len(layouts) == 1 and best[1].iteration_s > run.bound_s * (1 + 1e-9):
        best = _intensify(best, run)
    search, state = best
    rest = budget.share(1.0)
    return search.improve(state, rest, run.bound_s, run.report), run.bound_s


def _starts(layout: Layout, run: _Run, layouts: int) -> list[tuple[Search, State]]:
    """Return states to start from, with a search each."""
    options, seed = run.options, run.options.seed
    judge = _judge(layout)
    given = layout.given_placement()
    if given is None:
        count = max(2, _STARTS // layouts)
        proposed = propose_placements(layout, count, seed, run.budget.share(0.12 / layouts))
    else:
        proposed = [(given, list(balanced_routes(layout, seed)))]
    found = []
    for index, (placement, routes) in enumerate(proposed):
        search = Search(layout, seed + index, judge)
        state = search.start(placement, tuple(routes))
        if index == 0 and layouts == 1:
            choice = choose_routes(state.costs, run.budget, seed, options.num_workers, part=0.15)
            if given is not None:
                run.bound_s = max(run.bound_s, choice.bound_s)
            state = min(state, search.start(placement, choice.routes), key=lambda one: one.score)
        run.report(state)
        found.append((search, state))
    return found


def _race(starts: list[tuple[Search, State]], run: _Run) -> tuple[Search, State]:
    """Search from every start for a while and keep the better half, until one is left."""
    while len(starts) > 1:
        part = _ROUNDS_PART / len(starts)
        later = []
        for search, state in starts:
            share = run.budget.share(part)
            later.append((search, search.improve(state, share, run.bound_s, run.report)))
            run.budget.charge(share)
        later.sort(key=lambda item: item[1].score)
        starts = later[: max(1, len(later) // 2)]
    return starts[0]


def _intensify(best: tuple[Search, State], run: _Run) -> tuple[Search, State]:
    """Search on, then let the joint model improve the result and, where the placement is fixed, prove it."""
    search, state = best
    share = run.budget.share(0.4)
    state = search.improve(state, share, run.bound_s, run.report)
    run.budget.charge(share)
    result = improve_jointly(state, run.budget, run.options.seed, run.options.num_workers)
    if result is None:
        return search, state
    if not search.free:
        run.bound_s = max(run.bound_s, min(result.bound_s, state.iteration_s))
    if result.timeline is not None:
        found = search.score(result.timeline, result.routes)
        state = min(state, found, key=lambda one: one.score)
    return search, state


def _solver(options: SolveOptions, budget: Budget) -> Solver:
    try:
        release = version("skippipe")
    except PackageNotFoundError:
        release = "unknown"
    return Solver(
        name="skippipe insertion and large neighbourhood search",
        version=release,
        seed=options.seed,
        time_limit_s=0.0 if budget.repeatable else options.time_limit_s,
        wall_s=0.0 if budget.repeatable else round(budget.elapsed_s, 3),
    )
