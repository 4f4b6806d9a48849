"""What the compiled functions work on. M microbatches, P stages on the longest route, K = 2P + 1 tasks on its chain.

Rows of equal shape share one array, because compiled functions hand every array on by value.
"""

from typing import Final, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from skippipe_scheduler.problem.gradient_reduction import Reduction
from skippipe_scheduler.problem.sharing.contention import Contention
from skippipe_scheduler.search.kernel.constants import LABELS

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

CONTENTION: Final[dict[Contention, int]] = {kind: number for number, kind in enumerate(get_args(Contention))}
NOT_SHARED, SHARED_LINKS, SHARED_CARDS, SHARED_CAPACITY = (
    CONTENTION.values()
)  # a new kind fails here: teach it to `timing.retime` first
REDUCTION: Final[dict[Reduction, int]] = {kind: number for number, kind in enumerate(get_args(Reduction))}
RING, TREE, DIRECT, HIERARCHICAL = REDUCTION.values()  # a new algorithm fails here: teach it to `reduction_time` first
MOST_CHOSEN: Final = 16
"""Microbatches that one step takes out at most."""

FORWARD, BACKWARD, LOSS = 0, 1, 2
TRANSFER_S, OCCUPANCY_S, LATENCY_S, GBIT_PER_S = 0, 1, 2, 3
WEIGHT, REDUCE_S, REDUCE_GBIT = 0, 1, 2
LEAST, MOST = 0, 1
BUSY, HELD = 0, 1
BUSY_FROM, BUSY_TO, HELD_FROM, HELD_TO = 0, 1, 2, 3
RELEASE, START, DURATION, DELAY = 0, 1, 2, 3
FREE, CARD_OUT, CARD_IN, LAST_END = 0, 1, 2, 3
LEFT_GBIT, MOST_GBIT_PER_S, SPEED, SHARE, SINCE_S, END_S = 0, 1, 2, 3, 4, 5
TASK, BEHIND, UNDER_WAY, PLACE, JOINED, SEEN, FIRST_USED = 0, 1, 2, 3, 4, 5, 6
CAPACITY, DEMAND, REST = 0, 1, 2
USERS, GROWING, CROWDED, SEEN_BY = 0, 1, 2, 3
FIRST, LAST = 0, 1
COUNT, SEARCHES = 0, 1
NOBODY: Final = -1
CURRENT, CANDIDATE, BEST = 0, 1, 2
ITERATION_S, SCORE = 0, 1
END_OF_FORWARD, PROMISE, COST = 0, 1, 2
LENGTH: Final = -1
INDEX_BITS, INDEX_MASK = 10, 1023
"""A task is a microbatch, shifted, and the index in its chain; routes have at most 511 stages."""


class Instance(NamedTuple):
    """What the search never changes. Nodes by rank; slots are numbered stage by stage."""

    node_s: Floats  # (FORWARD | BACKWARD | LOSS, nodes), seconds of a stage of mean size
    memory: Integers  # (nodes,) microbatches
    pinned: Integers  # (nodes,) stage, -1 where the node is free
    region_of: Integers  # (nodes,) number of its region
    links: Floats  # (TRANSFER_S | OCCUPANCY_S | LATENCY_S | GBIT_PER_S, nodes, nodes)
    stages: Floats  # (WEIGHT | REDUCE_S | REDUCE_GBIT, stages); 0 Gbit where the reduction ignores the placement
    stage_of: Integers  # (slots,)
    first_slot: Integers  # (stages + 1,)
    visits: Integers  # (LEAST | MOST, stages) microbatches of an iteration
    factors: Floats  # (samples, table) of task and transfer times, (0, 1) where the nominal time counts
    overhead_s: float
    contention: int  # what transfers share, one of CONTENTION
    reduction: int  # how gradients are reduced, one of REDUCTION
    max_swaps: int
    max_swap_distance: int
    max_forward_jump: int
    free_origins: bool


class Cooling(NamedTuple):
    """One stretch of an annealing: temperatures in seconds of the score, and an iteration time that is good enough.

    If it `relays`, routes visit all stages in order, and microbatches also exchange where their nodes only relay.
    """

    steps: int
    from_s: float
    to_s: float
    goal_s: float
    relays: bool


class Schedule(NamedTuple):
    """A complete or partial schedule; a task is m << INDEX_BITS | its index in the chain of microbatch m."""

    placement: Integers  # (slots,) node
    routes: Integers  # (M, P) slots
    lengths: Integers  # (M,)
    relays: Integers  # (M, P) 1 where the slot only relays, which takes no time and holds nothing
    starts: Floats  # (M, K)
    counts: Integers  # (BUSY | HELD, slots) entries in the rows below
    tasks: Integers  # (BUSY | HELD, slots, width): tasks by start; microbatches by the start of their forward
    times_s: Floats  # (BUSY_FROM | BUSY_TO | HELD_FROM | HELD_TO, slots, width), BUSY_TO with the overhead


class Sharing(NamedTuple):
    """Memory for transfers that share R resources: cards out by node, cards in, then each uplink's two ways.

    Where nothing is shared, all but the lanes is empty. A transfer goes by its microbatch.
    """

    uplinks_of: Integers  # (nodes, deepest) uplinks that a node is behind, NOBODY where there are fewer
    transfers: Floats  # (LEFT_GBIT | MOST_GBIT_PER_S | SPEED | SHARE | SINCE_S | END_S, M), the speeds in Gbit/s
    numbers: Integers  # (TASK | BEHIND | UNDER_WAY | PLACE | JOINED | SEEN | FIRST_USED ..., M), see `fair_sharing`
    resources: Floats  # (CAPACITY | DEMAND | REST, R) Gbit/s; infinite where nothing limits
    counts: Integers  # (USERS | GROWING | CROWDED | SEEN_BY, R)
    queues: Integers  # (FIRST | LAST, slots, slots) first and last microbatch for a link, NOBODY where there is none
    state: Integers  # (COUNT | SEARCHES,) transfers under way; how often was searched for those that hang together
    lanes: Integers  # (slots,) how many slots of the same stage and region come before, where reductions go by region


class Queue(NamedTuple):
    """Memory for timing."""

    ready_s: Floats  # (M,) when the input of the next task is there
    following: Integers  # (M,) index of the task that can run next, -1 while its input is on the way
    pending_s: Floats  # (M + 1,) heap or stack of transfers
    pending: Integers  # (M + 1,)
    position: Integers  # (slots,)
    slot_s: Floats  # (FREE | CARD_OUT | CARD_IN | LAST_END, slots)
    link_free_s: Floats  # (slots, slots) or (0, 0) where links are not shared
    sharing: Sharing


class Work(NamedTuple):
    """Memory for one step of the search."""

    random: Integers  # (2,) state of the generator
    chosen: Integers  # (MOST_CHOSEN,) microbatches that the step takes out
    pool: Integers  # (M,)
    saved: Integers  # (MOST_CHOSEN, P + 1) routes before the step, their LENGTH last
    saved_s: Floats  # (MOST_CHOSEN, K) starts before the step
    visits: Integers  # (stages,)
    chain_s: Floats  # (RELEASE | START | DURATION | DELAY, K)
    route: Integers  # (P,) slots of a route before others are tried
    labels: Integers  # (P, LABELS) slots that a route may go through, the cheapest of each hop first
    parents: Integers  # (P, LABELS) which label of the hop before each comes from
    labels_s: Floats  # (END_OF_FORWARD | PROMISE | COST, P, LABELS), PROMISE: the end of all if nothing delays the rest


def empty_schedule(placement: Integers, routes: Integers, lengths: Integers, width: int) -> Schedule:
    """Return a schedule with room for `width` tasks in each slot, in which no microbatch is yet."""
    slots = len(placement)
    return Schedule(
        placement=placement.copy(),
        routes=routes.copy(),
        lengths=lengths.copy(),
        relays=np.zeros_like(routes),
        starts=np.zeros((len(routes), 2 * routes.shape[1] + 1)),
        counts=np.zeros((2, slots), np.int64),
        tasks=np.zeros((2, slots, width), np.int64),
        times_s=np.zeros((4, slots, width)),
    )


def make_sharing(uplinks_of: Integers, capacity: Floats, microbatches: int, slots: int) -> Sharing:
    """Return memory for transfers that share these capacities in Gbit/s, in the order of `Sharing`.

    For other kinds of contention there are no capacities and no microbatches.
    """
    shared = slots if microbatches else 0
    return Sharing(
        uplinks_of=uplinks_of,
        transfers=np.zeros((6, microbatches)),
        numbers=np.zeros((FIRST_USED + 2 + 2 * uplinks_of.shape[1], microbatches), np.int64),
        resources=np.stack([capacity, np.zeros_like(capacity), np.zeros_like(capacity)]),
        counts=np.zeros((4, len(capacity)), np.int64),
        queues=np.full((2, shared, shared), NOBODY),
        state=np.zeros(2, np.int64),
        lanes=np.zeros(slots, np.int64),
    )


def make_work(instance: Instance, routes: Integers, seed: int) -> Work:
    """Return working memory for schedules with these `routes`; `seed` decides all random choices."""
    microbatches, longest = routes.shape
    tasks = 2 * longest + 1
    return Work(
        random=np.random.default_rng(seed).integers(1, 2147483398, 2),
        chosen=np.zeros(MOST_CHOSEN, np.int64),
        pool=np.zeros(microbatches, np.int64),
        saved=np.zeros((MOST_CHOSEN, longest + 1), np.int64),
        saved_s=np.zeros((MOST_CHOSEN, tasks)),
        visits=np.zeros(instance.stages.shape[1], np.int64),
        chain_s=np.zeros((4, tasks)),
        route=np.zeros(longest, np.int64),
        labels=np.zeros((longest, LABELS), np.int64),
        parents=np.zeros((longest, LABELS), np.int64),
        labels_s=np.zeros((3, longest, LABELS)),
    )


def make_queue(instance: Instance, microbatches: int, sharing: Sharing) -> Queue:
    """Return memory for timing schedules of so many microbatches."""
    slots = len(instance.stage_of)
    shared = slots if instance.contention in (SHARED_LINKS, SHARED_CARDS) else 0
    return Queue(
        ready_s=np.zeros(microbatches),
        following=np.zeros(microbatches, np.int64),
        pending_s=np.zeros(microbatches + 1),
        pending=np.zeros(microbatches + 1, np.int64),
        position=np.zeros(slots, np.int64),
        slot_s=np.zeros((4, slots)),
        link_free_s=np.zeros((shared, shared)),
        sharing=sharing,
    )
