"""Every number that steers the search, with its unit, its meaning and where it comes from.

*Measured* says what, and on which instance, with two cores of an Intel Xeon. *Benchmark* means that the value was
settled with runs of `benchmarks/scheduler` (on the instance named, where that is known), of which only the final
results are kept. *Chosen* means judgement: nothing is recorded. The numbers of the compiled kernel, which have to be
constants, are in `search.kernel.constants`.

To try another value, hand `PortfolioSearch` or `LocalSearch` a `dataclasses.replace(PORTFOLIO, race_part=0.5)`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PortfolioTuning:
    """How a solve divides its budget: starts, race, joint model, intensification."""

    most_starts: int = 24
    """Searches that begin for each variant where the placement is free. Benchmark."""
    most_starts_of_given: int = 12
    """The same where the placement is given: then routes and order alone tell starts apart. Benchmark."""
    few_placements: int = 24
    """Up to this number of placements there are, the search begins at each. Chosen: as many as `most_starts`."""
    random_start_tasks: int = 10_000
    """Tasks from which no search begins at a random placement. Benchmark, 1,000 nodes: such a search does not catch up
    with those that begin at regions."""

    bounds_part: float = 0.05
    """Share of the time limit for lower bounds, over all variants. Chosen."""
    proven: float = 1e-6
    """A plan within this share of the bound ends the search. Chosen: bounds are rounded down by as much."""

    promise_part: float = 0.1
    """Share of the budget in which variants beside are looked through for one that promises much more. Chosen."""
    much_promise: float = 0.5
    """Times what the first variant promises: less is much more promising. Chosen: where reductions between regions
    decide, one region for each stage promises a tenth and less."""
    construction_part: float = 0.15
    """Share of the budget for schedules without a search, over all variants; one is made of each at least. Chosen."""
    few_sequences_limit_s: float = 5.0
    """Time limit of a search from which routes begin with few different sequences of stages. Chosen: to find these
    takes half a second with 27 stages, for each start, ..."""
    few_sequences_of: int = 300
    """... and next to nothing among so many legal sequences. Chosen."""
    first_schedule_task_s: float = 3.5e-5
    """Seconds that the first schedule of a variant takes for each task; variants without time for it are left out.
    Measured: 9 s with 257,000 tasks (128 stages on 1,000 nodes)."""
    race_part: float = 0.65
    """Share of what is left of the budget that the race gets. Chosen."""
    race_part_before_joint: float = 0.4
    """The same where the joint model over all routes follows, which needs the time more. Benchmark."""
    raced_of_balanced: int = 6
    """Starts in the race where loads decide: those whose balanced loads gave the best schedules. Chosen."""
    finalists: int = 2
    """Searches that go on after the race. Chosen: one for each of two workers."""

    steps_per_task: int = 600
    """Steps of a full annealing for each task of the problem. Chosen."""
    steps_per_task_before_joint: int = 300
    """The same where the joint model over all routes follows. Benchmark."""
    steps_from_tasks: int = 480
    """With a free placement and fewer tasks, steps are proportionally fewer, so that small problems begin at more
    placements in the same time. Benchmark."""
    short_annealing_exponent: float = 1.5
    """An annealing of a share x of the full steps begins x to this power times as hot: it has
    less time to cool. Chosen."""

    most_temperature_of_large: float = 0.12
    """Large schedules are annealed at most so many times as hot as others: one task is a small part of their score.
    Benchmark, regions-64 in 60 s: 78.2 s, 78.5 with 0.05, about 79.5 with 0.2 and 85.1 without it, which is worse than
    in 30 s."""

    joint_part: float = 0.15
    """Share of what is left for the joint model where the placement is free. Chosen."""
    joint_part_of_given: float = 0.5
    """The same where the placement is given: routes and order are then all there is. Benchmark."""
    joint_part_of_known: float = 0.85
    """The same where the model only combines the routes of the best plans, after a longer race.
    Benchmark."""
    joint_at_most_s: float = 40.0
    """Seconds (of deterministic time in a repeatable search) that the joint model gets at most. Chosen."""
    combined: int = 6
    """Best plans of the race whose routes the joint model may combine where all routes are too many. Benchmark."""

    cycle_part: float = 0.4
    """Share of what is left for one annealing of the finalists, more where a full annealing needs more. Chosen."""
    last_cycle_part: float = 0.7
    """A cycle that would take this share takes all that is left. Chosen: the rest would be too short for another."""
    cycle_cooling: float = 0.7
    """Each cycle begins this many times as hot as the one before it. Chosen."""
    least_temperature: float = 0.3
    """But not cooler than this share of the first. Chosen."""
    far_behind: float = 1.005
    """A finalist whose plan is longer than the leader's by this factor goes on from the leader's plan. Chosen."""

    balancing_part: float = 0.1
    """Share of the budget for balancing loads before the first exact schedule, whatever the size. Chosen."""
    balancing_part_of_shared: float = 0.5
    """The same where transfers share cards or capacities, as loads then tell most of what an order can reach.
    Benchmark, 8B on 100 nodes."""
    trial_part: float = 0.3
    """Share of that time in which all placements are tried, before the better half of them gets it. Measured, 300
    nodes: after 2.5 s on the loads the three best of eight reach 40 to 44 s and the others 53 to 66; after 8 s 30 to
    35, and 48 to 63."""
    balancing_steps_per_slot: int = 3000
    """Steps on the loads for each slot of a start that is not cut short, there; fewer starts and variants rather than
    fewer steps. Measured on 100 nodes in 10 regions: 300,000 steps reach 18 s, 100,000 18 to 34, a million 17 to 20."""
    least_balancing_steps: int = 100
    """Steps on the loads of every start at least. Chosen."""
    least_repeatable_balancing_steps: int = 1000
    """The same in a repeatable search. Chosen."""

    count_model_tasks: int = 1000
    """Tasks up to which the count model and the path search give further starts. Chosen: beyond, they take too long."""
    count_model_part: float = 0.1
    """Share of what is left for the count model. Chosen."""
    path_sets: int = 3
    """Sets of paths that searches begin from. Chosen."""
    path_set_expansions: int = 2000
    """Nodes of the path search that are expanded for them at most, about a tenth of a second. Benchmark: since
    it is 2,000 instead of 200, reference-20's published placement is solved to its proven optimum in eight seconds."""
    least_path_set_expansions: int = 200
    """The same at least, in short searches. Chosen."""
    path_set_expansions_per_s: float = 1000.0
    """The same for every second of the budget. Chosen."""
    path_set_evaluations: int = 10
    """In a repeatable search one expansion for so many steps. Chosen."""

    step_s: float = 1e-5
    """Seconds that a step of the local search takes, however small the schedule, ..."""
    task_s: float = 6e-8
    """... and for each task. Measured: 17 us with 252 tasks (regions-18) and 20 us with 270 (reference-20) on an idle
    machine; the estimate is half as much again, because too many starts cost more than too few."""
    large_step_s: float = 5e-5
    """The same for large schedules, which are changed in place, ..."""
    large_task_s: float = 2.5e-9
    """... and for each task. Measured: 38 us with 3,120 tasks (regions-64); the estimate is half as much again."""
    balancing_step_s: float = 1.3e-6
    """Seconds that a step on the loads takes ..."""
    balancing_slot_s: float = 4e-9
    """... and for each slot. Measured: 1.7 us with 20 slots (reference-20), 0.5 us with 18 (regions-18)."""
    shared_balancing_slot_s: float = 1e-7
    """The same where transfers share cards or capacities, most of it for exchanges of nodes. Measured: 12 us with 100
    slots."""


@dataclass(frozen=True)
class LocalSearchTuning:
    """How one local search begins, cools and keeps the time."""

    temperature: float = 0.012
    """Rise of the score that is accepted with probability 1/e at first, as a share of the best score. Chosen."""
    small_tasks: int = 100
    """With fewer tasks the temperature is higher in proportion: each task counts for more of the score. Chosen."""
    cooling_exponent: int = 2
    """The temperature falls with this power of the share of the budget that is left. Chosen."""

    large_tasks: int = 1500
    """Schedules with more tasks are changed in place instead of copied at each step. Chosen: copying takes time for
    every task, a step in place for those that it touches."""
    most_inserted_in_python: int = 100
    """Tasks up to which, where nothing is compiled, first schedules are made by insertions as well as by a dispatch.
    Measured: the insertions of 380 tasks take up to 8 s, those of 1,000 three minutes, where memory has room for all
    microbatches; a dispatch takes 0.04 s."""
    start_waits: tuple[float, ...] = (1.0, 4.0)
    """Longest waits of a task for its node, in mean backward times, that first schedules are tried with. Chosen."""
    large_start_wait: float = 24.0
    """The same for large schedules. Benchmark, 1,000 nodes: 455 s; 456 with 8, 469 with 4."""
    repair_wait: float = 2.0
    """Longest wait in mean backward times where a few microbatches are inserted again. Chosen."""
    greedy_waits: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Longest waits in largest backward times for first-come insertions; the best counts. Chosen."""

    chunk_s: float = 0.1
    """Seconds for which the kernel runs between two looks at the clock. Chosen: a search can be stopped as fast."""
    first_chunk: int = 20
    """Steps of the first chunk, before the speed is known. Chosen."""
    least_chunk: int = 10
    """Steps of a chunk at least. Chosen."""
    repeatable_chunk: int = 1000
    """Steps of a chunk in a repeatable search. Chosen: about a tenth of a second there, too."""
    rate_memory: float = 0.5
    """Weight of the speed so far in the running mean of steps a second. Chosen."""

    load_temperature: float = 0.015
    """Rise of the loads' value that is accepted at first, as a share of it. Chosen."""
    load_temperature_routes: int = 60
    """With more routes one route changes the loads less, so the temperature falls with the square. Chosen."""
    trip_weight: float = 0.2
    """Weight of the mean round trip beside the loads. Chosen."""
    trip_weight_of_shared: float = 1.0
    """The same where transfers share cards or capacities and much of a round trip is transfers: half of it passes
    before the last node has work, half after the first one has none. Measured on 100 nodes in 10 regions with 300,000
    steps: 17.9 s on the mean instead of 19.5 with 0.2."""
    load_cooling: float = 0.01
    """Share of the temperature that is left after all steps on the loads. Chosen."""
    load_chunk_s: float = 0.3
    """Seconds for which loads are balanced between two looks at the clock. Chosen: the first chunk is too small to tell
    the speed well, and long routes take fifty times as long as short ones."""
    load_chunk: int = 500_000
    """Steps on the loads between two looks at whether to stop. Measured: 0.3 to 0.8 s."""
    exchange_share: float = 0.3
    """Share of the steps on the loads that exchange two nodes, with few routes. Chosen."""
    exchange_share_of_cards: float = 0.6
    """The same, with many routes too, where the placement decides what cards carry or what reductions take; these steps
    are as hot as those of few routes. Measured on 100 nodes in 10 regions: 300,000 steps reach 70 s instead of 93."""
    exchange_routes: int = 100
    """With so many routes it is half of that, because an exchange counts all their loads anew. Chosen."""

    jitter_factors: int = 4096
    """Random factors of a sample, from which tasks and transfers take theirs by number. Chosen."""
    least_row: int = 60
    """Tasks that a slot's row has room for at least. Chosen."""
    row_shares: int = 8
    """And how many times its fair share of all tasks. Chosen: a start is refused where a row is full."""


@dataclass(frozen=True)
class JointModelTuning:
    """How large the joint CP-SAT model may be, and how finely it tells times apart."""

    most_choices: int = 2500
    """Pairs of a microbatch and a route up to which the model is built. Chosen: about what CP-SAT presolves within a
    few seconds."""
    units: int = 20_000
    """Whole units of time in the iteration of the hint. Chosen: rounding down costs the bound one unit a task."""
    small_tasks: int = 45
    """Up to this number of tasks the model gets `small_effort` at least, else `large_effort`. Chosen: such a model is
    usually solved to the optimum."""
    small_effort: float = 0.2
    """Units of CP-SAT's deterministic time. Chosen: with more, tiny problems of the tests came out no better."""
    large_effort: float = 0.05
    """Units of CP-SAT's deterministic time. Chosen."""


PORTFOLIO = PortfolioTuning()
LOCAL_SEARCH = LocalSearchTuning()
JOINT_MODEL = JointModelTuning()
