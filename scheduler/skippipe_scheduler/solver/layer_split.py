"""How many layers each stage gets where nodes are unequal: a local search over splits of the model.

Memory, gradient bytes and task times all follow from the split, so each split is a problem of its own. It is tried by a
short search for its plan, and the finalists are solved with equal budgets.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from skippipe_scheduler.budget import Budget
from skippipe_scheduler.errors import InfeasibleError
from skippipe_scheduler.options import SolveOptions
from skippipe_scheduler.problem.build import LayersPerStage, LayerSplitProblem
from skippipe_scheduler.problem.problem import Problem
from skippipe_scheduler.problem.workload import split_layers
from skippipe_scheduler.search.kernel.jit import prepare, slowness
from skippipe_scheduler.slots.placement import regional_placement
from skippipe_scheduler.slots.routes import priced_routes
from skippipe_scheduler.slots.slot_model import SlotCosts, SlotModel
from skippipe_scheduler.slots.solution import Solution
from skippipe_scheduler.solver.solve import solve_variants

Variants = Callable[[Problem], Sequence[Problem]]
"""The problems of which the best plan is wanted for one split of the layers, such as full pipelines of all sizes."""

_CLIMB_PART = 0.1
"""Share of the budget for the local search. Chosen: with the finalists' a quarter together."""
_COMPARE_PART = 0.05
"""Share of the budget for each finalist. Chosen."""
_FINALISTS = 3
"""Splits that are solved with equal budgets in the end: the first and the two best. Chosen."""
_COMPARE_S = 0.5
"""Seconds with less of which a comparison is noise, ... Chosen."""
_COMPARE_MOST = 0.1
"""... so a short budget gives a finalist up to this share. Chosen."""
_TRIALS = 40
"""Trials that the local search has time for. Chosen: a few neighbours of a few splits."""
_STEPS_PER_TASK = 5
"""Steps on the loads in a trial, for each task. Chosen: compiled, a trial takes milliseconds."""
_LEAST_STEPS = 20
"""And at least. Chosen."""
_LEAST_GAIN = 1e-3
"""Share of the iteration time by which a split must be shorter to be taken. Chosen: less is noise of short trials."""
_LEAST_LEFT = 0.05
"""Share of the time limit that is left for the solve itself at least. Chosen."""


def choose_layers(
    open_layers: LayerSplitProblem, options: SolveOptions, variants: Variants = lambda problem: [problem]
) -> tuple[Problem, SolveOptions]:
    """Return the problem with the best split found, and the options with the rest of their budget.

    The search begins at the even split (where a node has too little memory for it, at one that fits) and moves one
    layer at a time from one stage to another. The first split and the two best are then solved with equal budgets, and
    the one with the shortest plan is returned. All of it takes about a quarter of the budget, of a short one half, and
    is repeatable with `max_evaluations`. Raises `InfeasibleError` where no split fits the memory, and what `solve`
    raises.
    """
    prepare(options.time_limit_s if options.max_evaluations is None else None)
    budget = options.budget()
    first = _first_split(open_layers)
    trials = _Trials(open_layers, options, variants, budget.share(_CLIMB_PART))
    trials.of(first)
    budget.charge(trials.budget)
    trials.budget = budget.share(_CLIMB_PART)  # the time begins when the first trial has loaded the search
    _climb(trials, first)
    budget.charge(trials.budget)
    finalists = [first, *(layers for layers in trials.ranked() if layers != first)][:_FINALISTS]
    found = finalists[0]
    if len(finalists) > 1:
        found = _shortest(open_layers, options, variants, finalists)
        budget.spent += len(finalists) * (_compare_steps(options) or 0)
    return open_layers.with_layers(found), _rest(options, budget)


def _rest(options: SolveOptions, budget: Budget) -> SolveOptions:
    if budget.evaluations is not None:
        return replace(options, max_evaluations=max(1, budget.evaluations - budget.spent))
    return replace(
        options, time_limit_s=max(_LEAST_LEFT * options.time_limit_s, options.time_limit_s - budget.elapsed_s)
    )


def _first_split(open_layers: LayerSplitProblem) -> LayersPerStage:
    """Return the even split or, where stages are too large for their nodes, one with fewer layers there."""
    layers = [*split_layers(open_layers.num_layers, open_layers.num_stages)]
    too_large: set[int] = set()
    first_reason: InfeasibleError | None = None
    while True:
        try:
            open_layers.with_layers(tuple(layers))
        except InfeasibleError as reason:
            first_reason = first_reason or reason
            if reason.stage is None:
                raise
            too_large.add(reason.stage)
            takers = [stage for stage in range(len(layers)) if stage not in too_large]
            if not takers or layers[reason.stage] == 1:
                raise first_reason from None
            layers[reason.stage] -= 1
            layers[min(takers, key=lambda stage: layers[stage])] += 1
        else:
            return tuple(layers)


@dataclass(frozen=True)
class _Trial:
    """What a short search found for a split: the iteration time, and the busiest node's work at each stage."""

    iteration_s: float
    work_s: tuple[float, ...]


@dataclass
class _Trials:
    """Short searches for the plans of splits, each remembered."""

    open_layers: LayerSplitProblem
    options: SolveOptions
    variants: Variants
    budget: Budget
    done: dict[LayersPerStage, _Trial | None] = field(default_factory=dict)

    def of(self, layers: LayersPerStage) -> _Trial | None:
        """Return the trial of a split; None where its stages do not fit the nodes' memory."""
        if layers not in self.done:
            self.done[layers] = self._try(layers)
        return self.done[layers]

    def _try(self, layers: LayersPerStage) -> _Trial | None:
        try:
            problem = self.open_layers.with_layers(layers)
        except InfeasibleError:
            return None
        found = [self._search(SlotModel(variant)) for variant in self.variants(problem)]
        return min(found, key=lambda trial: trial.iteration_s)

    def ranked(self) -> list[LayersPerStage]:
        """Return the splits tried, the best first."""
        fitting = {layers: trial.iteration_s for layers, trial in self.done.items() if trial is not None}
        return sorted(fitting, key=lambda layers: fitting[layers])

    def _search(self, slot_model: SlotModel) -> _Trial:
        from skippipe_scheduler.search.local_search import LocalSearch

        steps = max(_LEAST_STEPS, int(_STEPS_PER_TASK * slot_model.num_tasks / self._slowness))
        placement = slot_model.given_placement() or regional_placement(slot_model)
        routes = priced_routes(SlotCosts(slot_model, placement), self.options.seed)
        options = self.options
        search = LocalSearch(slot_model, options.seed, options.robustness, repeatable=self.budget.repeatable)
        search.start(*search.balance_loads(placement, routes, steps))
        used = Budget(self.budget.limit_s / _TRIALS, None, self.options.stop)
        if self.budget.evaluations is not None:
            used = Budget(0.0, max(steps, self.budget.evaluations // _TRIALS), self.options.stop)
        solution = search.improve(used)
        self.budget.charge(used)
        return _Trial(solution.iteration_s, _work_s(slot_model, solution))

    @property
    def _slowness(self) -> float:
        return 1.0 if self.budget.repeatable else slowness()


def _work_s(slot_model: SlotModel, solution: Solution) -> tuple[float, ...]:
    costs = SlotCosts(slot_model, solution.placement)
    busy_s = [0.0] * len(slot_model.stage_of)
    for route in solution.routes:
        chain = costs.chain(route)
        for slot, duration_s in zip(chain.slots, chain.durations_s, strict=True):
            busy_s[slot] += duration_s
    return tuple(max(busy_s[slot] for slot in slots) for slots in slot_model.slots_of)


def _climb(trials: _Trials, layers: LayersPerStage) -> None:
    """Move layers, one at a time, as long as that shortens the iteration and the budget lasts."""
    best = trials.of(layers)
    while best is not None:
        for changed in _neighbours(layers, best.work_s):
            if trials.budget.exhausted:
                return
            trial = trials.of(changed)
            if trial is not None and trial.iteration_s < best.iteration_s * (1 - _LEAST_GAIN):
                layers, best = changed, trial
                break
        else:
            return


def _neighbours(layers: LayersPerStage, work_s: Sequence[float]) -> Iterator[LayersPerStage]:
    """Yield the splits with one layer moved, first from the stage with the busiest node to the one with the idlest."""
    stages = range(len(layers))
    moves = [(giver, taker) for giver in stages for taker in stages if giver != taker and layers[giver] > 1]
    moves.sort(key=lambda move: work_s[move[1]] - work_s[move[0]])
    for giver, taker in moves:
        yield tuple(count - (stage == giver) + (stage == taker) for stage, count in enumerate(layers))


def _compare_steps(options: SolveOptions) -> int | None:
    return options.max_evaluations and max(1, int(_COMPARE_PART * options.max_evaluations))


def _shortest(
    open_layers: LayerSplitProblem, options: SolveOptions, variants: Variants, finalists: Sequence[LayersPerStage]
) -> LayersPerStage:
    """Return the split with the shortest plan when all are solved with the same budget, the first of equals."""
    from skippipe_scheduler.search import portfolio  # noqa: F401 (loaded here, or the first finalist would lose this time)

    limit_s = options.time_limit_s
    short = replace(
        options,
        time_limit_s=max(_COMPARE_PART * limit_s, min(_COMPARE_S, _COMPARE_MOST * limit_s)),
        max_evaluations=_compare_steps(options),
        progress=None,
    )
    plans = {layers: solve_variants(variants(open_layers.with_layers(layers)), short) for layers in finalists}
    return min(plans, key=lambda layers: plans[layers].predicted.iteration_s)
