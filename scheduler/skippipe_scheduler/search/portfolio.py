"""One solve from start to end: several starts, a race between them, the winners searched on until time is up.

A portfolio of annealing searches: starts that differ in placement and routes race with equal shares of the budget, in
one round, and the best two go on. Then an exact model of routes and order together improves the best of them, where it
is small enough. At last the finalists are annealed again and again, cooler each time, until the budget is spent or the
plan reaches the lower bound.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, zip_longest
from threading import Lock

from skippipe_scheduler.baselines.paper_method.method import best_run, route_sets
from skippipe_scheduler.bounds import lower_bounds
from skippipe_scheduler.budget import Budget
from skippipe_scheduler.options import Progress, Robustness
from skippipe_scheduler.search.constructed import Constructed, construct_schedules, promise_s
from skippipe_scheduler.search.effort import SearchEffort
from skippipe_scheduler.search.joint_model import is_small_enough, solve_joint_model
from skippipe_scheduler.search.local_search import LocalSearch
from skippipe_scheduler.search.tuning import PORTFOLIO, PortfolioTuning
from skippipe_scheduler.slots.count_model import choose_routes
from skippipe_scheduler.slots.placement import few_placements, random_placement
from skippipe_scheduler.slots.replica_order import order_replicas, ordered_replicas
from skippipe_scheduler.slots.routes import balanced_routes, balanced_sequences, priced_routes
from skippipe_scheduler.slots.slot_model import SlotCosts, SlotModel, SlotPlacement, SlotRoute
from skippipe_scheduler.slots.solution import Solution


@dataclass(frozen=True)
class Incumbent:
    """A solution and the problem by slot that it belongs to."""

    slot_model: SlotModel
    solution: Solution


@dataclass
class PortfolioSearch:
    """Searches over one or more variants of a problem within one budget.

    `num_workers` threads run at a time; all randomness comes from `seed`. `bound_s` is the best lower bound known, of
    all variants, in seconds, and `best` the best plan so far. `progress` is told of each better plan, from any thread.
    """

    slot_models: Sequence[SlotModel]
    budget: Budget
    seed: int
    num_workers: int
    robustness: Robustness | None = None
    progress: Callable[[Progress], None] | None = None
    tuning: PortfolioTuning = PORTFOLIO
    bound_s: float = 0.0
    best: Incumbent | None = None
    announced_s: float = float("inf")
    lock: Lock = field(default_factory=Lock)
    searches: list[LocalSearch] = field(default_factory=list)
    known: Sequence[SlotRoute] = ()
    """Routes of the best of the race, where the placement is given."""
    beside: Sequence[SlotModel] = ()
    """Further variants that are searched only where a schedule made without a search is better there."""

    @property
    def effort(self) -> SearchEffort:
        """What is left of the budget, in steps and starts."""
        return SearchEffort(self.budget, self.num_workers, len(self.slot_models), self.tuning)

    def run(self, warm: Solution | None = None) -> Incumbent:
        """Search until the budget is spent, the bound is reached or somebody stops it; return the best plan found."""
        limit_s = 0.0
        if not self.budget.repeatable:
            self._choose_variants()
            limit_s = self.tuning.bounds_part * self.budget.limit_s / len(self.slot_models)
        bounds = (lower_bounds(slot_model.problem, limit_s, self.budget.stop) for slot_model in self.slot_models)
        self.bound_s = min(max(of_variant.values()) for of_variant in bounds)
        with ThreadPoolExecutor(self.num_workers) as pool:
            if warm is not None:
                self._resume(warm, pool)
            else:
                self._start_all(pool)
            self._race(pool)
            self._solve_joint_model()
            self._intensify(pool)
        if self.best is None:
            raise RuntimeError("a portfolio search without a problem")
        return self.best

    def _local_search(self, slot_model: SlotModel, seed: int) -> LocalSearch:
        return LocalSearch(slot_model, seed, self.robustness, repeatable=self.budget.repeatable)

    def _choose_variants(self) -> None:
        """Leave out variants for which there is no time; those beside come in turn with the others where loads decide.

        A schedule made without a search does not tell what balanced loads can reach. A variant beside that promises
        much more than the first comes before it.
        """
        first, turns = self.slot_models[0], list(self.slot_models)
        if self.effort.loads_decide(first):
            pairs = zip_longest(self.slot_models, self.beside)
            turns = [slot_model for pair in pairs for slot_model in pair if slot_model is not None]
        better = self._much_more_promising(first)
        if better is not None:
            turns = [better, *(slot_model for slot_model in turns if slot_model is not better)]
        self.slot_models = turns[: self.effort.affordable_variants(first)]
        self.beside = [variant for variant in self.beside if not any(variant is chosen for chosen in self.slot_models)]

    def _much_more_promising(self, first: SlotModel) -> SlotModel | None:
        """Return the first variant beside that promises much more than `first`, if any is found in little time."""
        if not self.beside or first.given_placement() is not None:
            return None
        budget, goal_s = self.budget.share(self.tuning.promise_part), self.tuning.much_promise * promise_s(first)
        for slot_model in self.beside:
            if budget.exhausted:
                break
            if promise_s(slot_model) < goal_s:
                return slot_model
        return None

    def _resume(self, warm: Solution, pool: ThreadPoolExecutor) -> None:
        """Begin at an older plan: in its own order and, where there is time, with balanced loads in a new one."""
        slot_model = self.slot_models[0]
        anew = self.num_workers if self.effort.steps_left(slot_model) > slot_model.num_tasks else 0
        steps, stop = self.effort.balancing_steps(slot_model, max(1, anew)), self.budget.stop
        limit_s = self.effort.balancing_limit_s(slot_model, max(1, anew))

        def begin(index: int) -> tuple[LocalSearch, Solution]:
            search = self._local_search(slot_model, self.seed + index)
            if index == 0:
                return search, search.repair(warm)
            return search, search.start(
                *search.balance_loads(warm.placement, warm.routes, steps, exchange=False, limit_s=limit_s, stop=stop)
            )

        for search, solution in pool.map(begin, range(1 + anew)):
            self._add(search, solution)
        self.searches = sorted(self.searches, key=lambda search: search.best_solution().key)[: max(1, self.num_workers)]

    def _start_all(self, pool: ThreadPoolExecutor) -> None:
        """Add searches in all variants for which there is time, and those beside where they begin better.

        What needs no search comes before what does: after it there may be no time left.
        """
        constructed, beside = self._construct_all(), self._construct_beside()
        for slot_model, schedules in zip(self.slot_models, constructed, strict=False):
            if self.best is None or not self.budget.exhausted:
                self._start_searches(slot_model, schedules, pool)
        for schedule in beside:
            self._add_better(schedule)

    def _start_searches(
        self, slot_model: SlotModel, constructed: Sequence[Constructed], pool: ThreadPoolExecutor
    ) -> None:
        """Add searches from several placements and routes, each with its loads balanced first."""
        every = () if slot_model.given_placement() else few_placements(slot_model, self.tuning.few_placements)
        bases: Sequence[SlotPlacement] = every or [found.solution.placement for found in constructed]
        if not every and len(bases) > 1 and self.effort.loads_decide(slot_model):
            bases = self._try_placements(slot_model, bases, pool)
        effort = self.effort
        count = len(every) or max(2, effort.affordable_starts(slot_model) // len(self.slot_models))
        steps, limit_s = effort.balancing_steps(slot_model, count), effort.balancing_limit_s(slot_model, count)
        begin = partial(self._begin_at, slot_model, bases, steps, limit_s, not every)
        for begun in pool.map(begin, range(count)):
            if begun is not None:
                self._add(*begun)
        self._add_better(constructed[0])
        if slot_model.given_placement() is not None and slot_model.num_tasks <= self.tuning.count_model_tasks:
            self._start_from_count_model(slot_model)
            if slot_model.lists_all_sequences:  # else one path has too many sets of stages to go through
                self._start_from_path_sets(slot_model)

    def _try_placements(
        self, slot_model: SlotModel, placements: Sequence[SlotPlacement], pool: ThreadPoolExecutor
    ) -> Sequence[SlotPlacement]:
        """Return the better half of the placements, by what loads that are balanced for a short time make of each.

        What is constructed does not tell: nodes have to be exchanged before reductions and round trips are short.
        """
        count, effort = len(placements), self.effort
        limits = effort.trial_steps(slot_model, count), effort.trial_limit_s(slot_model, count)
        begin = partial(self._begin_at, slot_model, placements, *limits, True)
        tried = [(index, begun) for index, begun in enumerate(pool.map(begin, range(count))) if begun is not None]
        for _, begun in tried:
            self._add(*begun)
        best = sorted(tried, key=lambda each: each[1][1].key)[: (count + 1) // 2]
        return [placements[index] for index, _ in best] or placements

    def _begin_at(
        self,
        slot_model: SlotModel,
        placements: Sequence[SlotPlacement],
        steps: int,
        limit_s: float,
        exchange: bool,
        index: int,
    ) -> tuple[LocalSearch, Solution] | None:
        """Return search `index` and its first schedule, for balanced loads (`exchange` of nodes, too); None if late."""
        if self.budget.exhausted:
            return None
        search = self._local_search(slot_model, self.seed + index)
        base = self._start_of(slot_model, index, placements)
        placement, routes = search.balance_loads(
            *base, steps, exchange=exchange, limit_s=limit_s, stop=self.budget.stop
        )
        return search, search.start(*ordered_replicas(slot_model, placement, routes), fewer_begun=True)

    def _construct(self, slot_model: SlotModel, budget: Budget) -> list[Constructed]:
        """Return schedules that need no search, the best first."""
        few = self.effort.looks_for_few_sequences(slot_model)
        return construct_schedules(slot_model, budget, self.seed, self.robustness, self._announce, few_sequences=few)

    @property
    def _construction_part(self) -> float:
        """Share of what is left in which schedules of one variant are made without a search."""
        return self.tuning.construction_part / (len(self.slot_models) + bool(self.beside))

    def _construct_all(self) -> list[list[Constructed]]:
        """Return schedules of each variant that need no search, as long as there is time: of the first at least."""
        found: list[list[Constructed]] = []
        for slot_model in self.slot_models:
            if found and self.budget.exhausted:
                break
            found.append(self._construct(slot_model, self.budget.share(self._construction_part)))
        return found

    def _construct_beside(self) -> list[Constructed]:
        """Return the best schedule that needs no search of each variant beside for which there is time.

        The first has the time of one variant, and all others together as much again.
        """
        budget, found = self.budget.share(2 * self._construction_part), list[Constructed]()
        for slot_model in self.beside:
            if budget.exhausted or self.budget.exhausted:
                break
            found.append(self._construct(slot_model, budget.share(0.5))[0])
        return found

    def _add_better(self, constructed: Constructed) -> None:
        """Add the search of a schedule that was made without one, where it is better than all so far."""
        if self.best is None or constructed.solution.key < self.best.solution.key:
            self._add(constructed.search, constructed.solution)

    def _start_of(
        self, slot_model: SlotModel, index: int, placements: Sequence[SlotPlacement]
    ) -> tuple[SlotPlacement, Sequence[SlotRoute]]:
        """Return the placement (of `placements` where there are some left) and the routes of start `index`.

        The first is the most promising, the others differ.
        """
        seed = self.seed + index
        free = slot_model.given_placement() is None
        if free and index >= len(placements) and slot_model.num_tasks <= self.tuning.random_start_tasks:
            return random_placement(slot_model, seed), balanced_routes(slot_model, seed)
        placement = placements[index % len(placements)]
        sequences = balanced_sequences(slot_model, seed, few=self.effort.looks_for_few_sequences(slot_model))
        return placement, priced_routes(SlotCosts(slot_model, placement), seed, sequences)

    def _start_from_count_model(self, slot_model: SlotModel) -> None:
        """Add a search from the routes of the count model, whose bound is one of the problem's."""
        placement = order_replicas(slot_model, slot_model.given_placement() or ())
        costs, part = SlotCosts(slot_model, placement), self.tuning.count_model_part
        choice = choose_routes(costs, self.budget, self.seed, self.num_workers, part=part)
        if len(self.slot_models) == 1:
            self.bound_s = max(self.bound_s, choice.bound_s)
        search = self._local_search(slot_model, self.seed + self.tuning.most_starts + 1)
        self._add(search, search.start(placement, choice.routes))

    def _start_from_path_sets(self, slot_model: SlotModel) -> None:
        """Add searches from routes that groups of microbatches share (`skippipe_scheduler.baselines.paper_method`)."""
        placement = order_replicas(slot_model, slot_model.given_placement() or ())
        budget = Budget(0.0, self.effort.path_set_expansions(), self.budget.stop)
        costs = SlotCosts(slot_model, placement)
        sets = islice(route_sets(costs, budget, self.seed), self.tuning.path_sets)
        for index, routes in enumerate(sets):
            search = self._local_search(slot_model, self.seed + self.tuning.most_starts + 2 + index)
            self._add(search, search.resume(best_run(costs, routes)))

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
        steps = part * self.effort.steps_left(searches[0].slot_model) / len(searches)
        completeness = min(1.0, steps / self.effort.full_annealing(searches[0].slot_model))
        temperature *= completeness**self.tuning.short_annealing_exponent
        if searches[0].large:
            temperature = min(self.tuning.most_temperature_of_large, temperature)

        def improve(search: LocalSearch) -> tuple[Budget, Solution]:
            budget = Budget(left.limit_s, left.evaluations, left.stop)
            return budget, search.improve(budget, self.bound_s, self._announce, temperature)

        for search, (used, solution) in zip(searches, pool.map(improve, searches), strict=True):
            self.budget.charge(used)
            search.steps += used.spent
            self._report(search, solution)

    def _race(self, pool: ThreadPoolExecutor) -> None:
        """Anneal from every start and keep the finalists."""
        finalists = self.tuning.finalists
        if self.effort.loads_decide(self.searches[0].slot_model):
            self.searches.sort(key=lambda search: search.best_solution().key)
            self.searches = self.searches[: self.tuning.raced_of_balanced]
        if len(self.searches) > finalists and not self._finished():
            self._anneal(pool, self.searches, self.effort.race_part(self.searches[0].slot_model), 1.0)
            self.searches.sort(key=lambda search: search.best_solution().key)
            variant = self.searches[0].slot_model
            leaders = [search for search in self.searches[: self.tuning.combined] if search.slot_model is variant]
            if variant.given_placement() is not None:
                self.known = [route for search in leaders for route in search.best_solution().routes]
            self.searches = self.searches[:finalists]
            for search in self.searches:
                search.restart()

    def _solve_joint_model(self) -> None:
        """Let the joint model improve the best, where it is small enough, and prove it where the placement is fixed."""
        if self.best is None or self._finished() or self.robustness:
            return
        slot_model, solution = self.best.slot_model, self.best.solution
        tuning, part = self.tuning, self.tuning.joint_part_of_given
        if slot_model.given_placement() is None:
            part = tuning.joint_part
        elif self.known and not is_small_enough(slot_model):
            part = tuning.joint_part_of_known
        result = solve_joint_model(
            slot_model,
            solution,
            self.known,
            self.budget,
            self.seed,
            self.num_workers,
            part=part,
            at_most_s=tuning.joint_at_most_s,
        )
        if result is None:
            return
        if slot_model.given_placement() is not None and len(self.slot_models) == 1:
            self.bound_s = max(self.bound_s, min(result.bound_s, solution.iteration_s))
        if result.routes is not None:
            search = self._local_search(slot_model, self.seed + self.tuning.most_starts)
            found = Solution(solution.placement, result.routes, result.starts, solution.iteration_s, solution.score)
            self._add(search, search.resume(found))
            self.searches = sorted(self.searches, key=lambda search: search.best_solution().key)[: tuning.finalists]

    def _intensify(self, pool: ThreadPoolExecutor) -> None:
        """Anneal the finalists again and again, cooler each time; one far behind starts again from the best."""
        tuning, temperature = self.tuning, 1.0
        while not self._finished():
            full = len(self.searches) * self.effort.full_annealing(self.searches[0].slot_model)
            part = max(tuning.cycle_part, full / max(1.0, self.effort.steps_left(self.searches[0].slot_model)))
            self._anneal(pool, self.searches, part if part < tuning.last_cycle_part else 1.0, temperature)
            self.searches.sort(key=lambda search: search.best_solution().key)
            leader = self.searches[0]
            for search in self.searches[1:]:
                limit_s = tuning.far_behind * leader.best_solution().iteration_s
                if search.slot_model is leader.slot_model and search.best_solution().iteration_s > limit_s:
                    search.resume(leader.best_solution())
            for search in self.searches:
                search.restart()
            temperature = max(tuning.least_temperature, tuning.cycle_cooling * temperature)

    def _finished(self) -> bool:
        proven_s = self.bound_s * (1 + self.tuning.proven) + 1e-9
        return self.budget.exhausted or (self.best is not None and self.best.solution.iteration_s <= proven_s)
