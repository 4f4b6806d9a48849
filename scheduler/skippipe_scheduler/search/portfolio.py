"""One solve from start to end: several starts, a race between them, the winners searched on until time is up."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from threading import Lock

from skippipe_scheduler.baselines.paper_method.method import best_run, route_sets
from skippipe_scheduler.bounds import lower_bounds
from skippipe_scheduler.budget import Budget
from skippipe_scheduler.options import Progress, Robustness
from skippipe_scheduler.search.joint_model import is_small_enough, solve_joint_model
from skippipe_scheduler.search.kernel.jit import slowness
from skippipe_scheduler.search.local_search import LARGE_TASKS, LocalSearch
from skippipe_scheduler.slots.placement import few_placements, random_placement, regional_placement
from skippipe_scheduler.slots.routes import balanced_routes, choose_routes, priced_routes
from skippipe_scheduler.slots.slot_model import SlotCosts, SlotModel, SlotPlacement, SlotRoute
from skippipe_scheduler.slots.solution import Solution

_MOST_STARTS_OF_GIVEN, _MOST_STARTS = 12, 24
"""Where the placement is given, and for each variant of the problem where it is free."""
_FEW_PLACEMENTS = 24
"""Up to this number of placements there are, the search begins at each."""
_RANDOM_START_TASKS = 10_000
"""With more tasks a search from a random placement does not catch up: all begin at regions, with other seeds."""
_RACE_PART, _RACE_PART_OF_JOINT = 0.65, 0.4
_CYCLE_PART = 0.4
_JOINT_PART, _JOINT_PART_OF_GIVEN, _CROSSING_PART = 0.15, 0.5, 0.85
"""Of what is left of the budget; where the placement is given, more for the joint model, because routes and order are
then all there is, and most where it only combines known routes, after a longer race.
"""
_BOUNDS_PART = 0.05
_PROVEN = 1e-6
"""A plan within this share of the bound ends the search: bounds are rounded down by as much."""
_JOINT_AT_MOST_S = 40.0
_CROSSED = 6
"""Plans whose routes the joint model may combine where there are too many for it."""
_STEPS_PER_TASK, _STEPS_PER_TASK_OF_JOINT = 600, 300
"""Steps of a full annealing for each task; fewer where the joint model follows."""
_STEPS_FROM_TASKS = 480
"""With a free placement and fewer tasks they are proportionally fewer: small problems begin at more placements."""
_LIGHT_PART = 0.1
_LIGHT_STEP_S, _LIGHT_SLOT_S = 1.3e-6, 4e-9
"""About how long a step on the loads takes, and how much of it each slot adds."""
_TEAMS = 3
_TEAM_EXPANSIONS, _LEAST_TEAM_EXPANSIONS = 2000, 200
"""Effort for the path search, about a tenth of a second, and in short searches."""
_COUNT_MODEL_TASKS = 1000
"""The count model is worth its time up to this number of tasks."""
_STEP_S, _TASK_S = 1e-5, 6e-8
"""About how long a step takes, and how much of it each task adds."""
_LARGE_STEP_S, _LARGE_TASK_S = 5e-5, 2.5e-9
"""The same for large schedules, which are changed in place."""


@dataclass(frozen=True)
class Incumbent:
    """A solution and the problem by slot that it belongs to."""

    slot_model: SlotModel
    solution: Solution


@dataclass
class PortfolioSearch:
    """Searches over one or more variants of a problem within one budget."""

    slot_models: Sequence[SlotModel]
    budget: Budget
    seed: int
    num_workers: int
    robustness: Robustness | None = None
    progress: Callable[[Progress], None] | None = None
    bound_s: float = 0.0
    best: Incumbent | None = None
    announced_s: float = float("inf")
    lock: Lock = field(default_factory=Lock)
    searches: list[LocalSearch] = field(default_factory=list)
    known: Sequence[SlotRoute] = ()
    """Routes of the best of the race, where the placement is given."""

    def run(self, warm: Solution | None = None) -> Incumbent:
        """Search until the budget is spent, the bound is reached or somebody stops it; return the best plan found."""
        limit_s = 0.0 if self.budget.repeatable else _BOUNDS_PART * self.budget.limit_s / len(self.slot_models)
        bounds = (lower_bounds(slot_model.problem, limit_s, self.budget.stop) for slot_model in self.slot_models)
        self.bound_s = min(max(of_variant.values()) for of_variant in bounds)
        with ThreadPoolExecutor(self.num_workers) as pool:
            if warm is not None:
                self._resume(warm, pool)
            else:
                for slot_model in self.slot_models:
                    self._start_searches(slot_model, pool)
            self._race(pool)
            self._solve_joint_model()
            self._intensify(pool)
        if self.best is None:
            raise RuntimeError("a portfolio search without a problem")
        return self.best

    def _resume(self, warm: Solution, pool: ThreadPoolExecutor) -> None:
        """Begin at an older plan: in its own order and, where there is time, with balanced loads in a new one."""
        slot_model = self.slot_models[0]
        anew = self.num_workers if self._steps_left(slot_model) > slot_model.num_tasks else 0
        steps, stop = self._balancing_steps(slot_model, max(1, anew)), self.budget.stop

        def begin(index: int) -> tuple[LocalSearch, Solution]:
            search = LocalSearch(slot_model, self.seed + index, self.robustness)
            if index == 0:
                return search, search.repair(warm)
            return search, search.start(
                *search.balance_loads(warm.placement, warm.routes, steps, exchange=False, stop=stop)
            )

        for search, solution in pool.map(begin, range(1 + anew)):
            self._add(search, solution)
        self.searches = sorted(self.searches, key=lambda search: search.best_solution().key)[: max(1, self.num_workers)]

    def _start_searches(self, slot_model: SlotModel, pool: ThreadPoolExecutor) -> None:
        """Add searches from several placements and routes, each with its loads balanced first."""
        every = () if slot_model.given_placement() else few_placements(slot_model, _FEW_PLACEMENTS)
        count = len(every) or max(2, self._affordable_starts(slot_model) // len(self.slot_models))
        steps = self._balancing_steps(slot_model, count)

        def begin(index: int) -> tuple[LocalSearch, Solution]:
            search = LocalSearch(slot_model, self.seed + index, self.robustness)
            base = _base(slot_model, self.seed, index, every)
            placement, routes = search.balance_loads(*base, steps, exchange=not every, stop=self.budget.stop)
            return search, search.start(placement, routes)

        for search, solution in pool.map(begin, range(count)):
            self._add(search, solution)
        if slot_model.given_placement() is not None and slot_model.num_tasks <= _COUNT_MODEL_TASKS:
            self._start_from_count_model(slot_model)
            self._start_from_path_sets(slot_model)

    def _start_from_count_model(self, slot_model: SlotModel) -> None:
        """Add a search from the routes of the count model, whose bound is one of the problem's."""
        placement = slot_model.given_placement() or ()
        choice = choose_routes(SlotCosts(slot_model, placement), self.budget, self.seed, self.num_workers, part=0.1)
        if len(self.slot_models) == 1:
            self.bound_s = max(self.bound_s, choice.bound_s)
        search = LocalSearch(slot_model, self.seed + _MOST_STARTS + 1, self.robustness)
        self._add(search, search.start(placement, choice.routes))

    def _start_from_path_sets(self, slot_model: SlotModel) -> None:
        """Add searches from routes that groups of microbatches share (`skippipe_scheduler.baselines.paper_method`)."""
        placement = slot_model.given_placement() or ()
        affordable = self.budget.evaluations // 10 if self.budget.evaluations is not None else 1000 * self.budget.left_s
        expansions = min(_TEAM_EXPANSIONS, max(_LEAST_TEAM_EXPANSIONS, int(affordable)))
        budget = Budget(0.0, expansions, self.budget.stop)
        costs = SlotCosts(slot_model, placement)
        sets = islice(route_sets(costs, budget, self.seed), _TEAMS)
        for index, routes in enumerate(sets):
            search = LocalSearch(slot_model, self.seed + _MOST_STARTS + 2 + index, self.robustness)
            self._add(search, search.resume(best_run(costs, routes)))

    def _balancing_steps(self, slot_model: SlotModel, count: int) -> int:
        step_s = slowness() * (_LIGHT_STEP_S + _LIGHT_SLOT_S * len(slot_model.stage_of))
        if self.budget.evaluations is not None:
            return max(1000, int(_LIGHT_PART * self.budget.evaluations / count))
        return max(
            100, int(_LIGHT_PART * self.num_workers * self.budget.left_s / step_s / count / len(self.slot_models))
        )

    def _affordable_starts(self, slot_model: SlotModel) -> int:
        """Return how many full annealings fit into the race."""
        most = _MOST_STARTS if slot_model.given_placement() is None else _MOST_STARTS_OF_GIVEN
        affordable = int(_race_part(slot_model) * self._steps_left(slot_model) / _full_annealing(slot_model))
        return min(most * len(self.slot_models), affordable)

    def _steps_left(self, slot_model: SlotModel) -> float:
        """Return about how many steps all workers can still make."""
        if self.budget.evaluations is not None:
            return self.budget.evaluations - self.budget.spent
        step_s = _STEP_S + _TASK_S * slot_model.num_tasks
        if slot_model.num_tasks > LARGE_TASKS:
            step_s = _LARGE_STEP_S + _LARGE_TASK_S * slot_model.num_tasks
        return self.num_workers * self.budget.left_s / slowness() / step_s

    def _add(self, search: LocalSearch, solution: Solution) -> None:
        self.searches.append(search)
        self._report(search, solution)

    def _report(self, search: LocalSearch, solution: Solution) -> None:
        """Remember an improvement."""
        if self.best is None or solution.key < self.best.solution.key:
            self.best = Incumbent(search.slot_model, solution)
        self._announce(solution)

    def _announce(self, solution: Solution) -> None:
        """Tell the caller of an improvement, from any thread."""
        with self.lock:
            if self.progress is None or solution.iteration_s >= self.announced_s:
                return
            self.announced_s = solution.iteration_s
            spent = sum(search.steps for search in self.searches)
            self.progress(Progress(self.budget.elapsed_s, spent, solution.iteration_s, self.bound_s))

    def _anneal(
        self, pool: ThreadPoolExecutor, searches: Sequence[LocalSearch], part: float, temperature: float
    ) -> None:
        """Give every search its share of `part` of what is left; as many as there are workers run at a time."""
        at_once = min(len(searches), self.num_workers)
        share_each = part * at_once / len(searches) if not self.budget.repeatable else part / len(searches)
        left = self.budget.share(share_each)
        steps = part * self._steps_left(searches[0].slot_model) / len(searches)
        temperature *= min(1.0, steps / _full_annealing(searches[0].slot_model)) ** 1.5

        def improve(search: LocalSearch) -> tuple[Budget, Solution]:
            budget = Budget(left.limit_s, left.evaluations, left.stop)
            return budget, search.improve(budget, self.bound_s, self._announce, temperature)

        for search, (used, solution) in zip(searches, pool.map(improve, searches), strict=True):
            self.budget.charge(used)
            search.steps += used.spent
            self._report(search, solution)

    def _race(self, pool: ThreadPoolExecutor) -> None:
        """Anneal from every start and keep the best two."""
        if len(self.searches) > 2 and not self._finished():
            self._anneal(pool, self.searches, _race_part(self.searches[0].slot_model), 1.0)
            self.searches.sort(key=lambda search: search.best_solution().key)
            leaders = [
                search for search in self.searches[:_CROSSED] if search.slot_model is self.searches[0].slot_model
            ]
            if leaders[0].slot_model.given_placement() is not None:
                self.known = [route for search in leaders for route in search.best_solution().routes]
            self.searches = self.searches[:2]
            for search in self.searches:
                search.restart()

    def _solve_joint_model(self) -> None:
        """Let the joint model improve the best, where it is small enough, and prove it where the placement is fixed."""
        if self.best is None or self._finished() or self.robustness:
            return
        slot_model, solution = self.best.slot_model, self.best.solution
        part = _CROSSING_PART if self.known and not is_small_enough(slot_model) else _JOINT_PART_OF_GIVEN
        part = _JOINT_PART if slot_model.given_placement() is None else part
        limits = {"part": part, "at_most_s": _JOINT_AT_MOST_S}
        result = solve_joint_model(slot_model, solution, self.known, self.budget, self.seed, self.num_workers, **limits)
        if result is None:
            return
        if slot_model.given_placement() is not None and len(self.slot_models) == 1:
            self.bound_s = max(self.bound_s, min(result.bound_s, solution.iteration_s))
        if result.routes is not None:
            search = LocalSearch(slot_model, self.seed + _MOST_STARTS, self.robustness)
            found = Solution(solution.placement, result.routes, result.starts, solution.iteration_s, solution.score)
            self._add(search, search.resume(found))
            self.searches = sorted(self.searches, key=lambda search: search.best_solution().key)[:2]

    def _intensify(self, pool: ThreadPoolExecutor) -> None:
        """Anneal the finalists again and again, cooler each time; one far behind starts again from the best."""
        temperature = 1.0
        while not self._finished():
            full = len(self.searches) * _full_annealing(self.searches[0].slot_model)
            part = max(_CYCLE_PART, full / max(1.0, self._steps_left(self.searches[0].slot_model)))
            self._anneal(pool, self.searches, part if part < 0.7 else 1.0, temperature)
            self.searches.sort(key=lambda search: search.best_solution().key)
            leader = self.searches[0]
            for search in self.searches[1:]:
                if (
                    search.slot_model is leader.slot_model
                    and search.best_solution().iteration_s > 1.005 * leader.best_solution().iteration_s
                ):
                    search.resume(leader.best_solution())
            for search in self.searches:
                search.restart()
            temperature = max(0.3, 0.7 * temperature)

    def _finished(self) -> bool:
        reached = self.best is not None and self.best.solution.iteration_s <= self.bound_s * (1 + _PROVEN) + 1e-9
        return reached or self.budget.exhausted


def _base(
    slot_model: SlotModel, seed: int, index: int, every: Sequence[SlotPlacement] = ()
) -> tuple[SlotPlacement, Sequence[SlotRoute]]:
    """Return a placement (of `every` where given) and routes whose loads to balance.

    The first is the most promising, the others differ.
    """
    placement = every[index] if every else slot_model.given_placement()
    if placement is None and index and slot_model.num_tasks <= _RANDOM_START_TASKS:
        return random_placement(slot_model, seed + index), balanced_routes(slot_model, seed + index)
    placement = placement or regional_placement(slot_model)
    return placement, priced_routes(SlotCosts(slot_model, placement), seed + index)


def _race_part(slot_model: SlotModel) -> float:
    return _RACE_PART_OF_JOINT if _joint_follows(slot_model) else _RACE_PART


def _full_annealing(slot_model: SlotModel) -> int:
    if _joint_follows(slot_model):
        return _STEPS_PER_TASK_OF_JOINT * slot_model.num_tasks
    if slot_model.given_placement() is not None:
        return _STEPS_PER_TASK * slot_model.num_tasks
    return int(_STEPS_PER_TASK * slot_model.num_tasks * min(1.0, slot_model.num_tasks / _STEPS_FROM_TASKS))


def _joint_follows(slot_model: SlotModel) -> bool:
    return slot_model.given_placement() is not None and is_small_enough(slot_model)
