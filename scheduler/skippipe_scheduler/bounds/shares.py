"""The least time in which workers that differ can take a number of items together."""

import heapq
import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

_HALVINGS = 50
"""Of the interval in which a least time lies: then it is as exact as floats are."""
_SHORTEST_S = 1e-30
"""In place of no time at all for an item, so that it can be divided by."""


def least_linear_time_s(
    before_s: npt.NDArray[np.float64], each_s: npt.NDArray[np.float64], chosen: int, items: int
) -> float:
    """Return the least time by which `chosen` workers take `items` together, whichever are best, when a worker that
    takes any needs `each_s` for each and `before_s` besides, both (W,).
    """
    low_s, high_s = 0.0, float((before_s + items * each_s).min())
    if not math.isfinite(high_s):
        return high_s
    divisor_s = np.maximum(each_s, _SHORTEST_S)
    for _ in range(_HALVINGS):
        middle_s = (low_s + high_s) / 2
        taken = np.sort(np.clip(np.floor((middle_s - before_s) / divisor_s), 0, items))  # (W,)
        low_s, high_s = (low_s, middle_s) if taken[-chosen:].sum() >= items else (middle_s, high_s)
    return low_s


def least_time_s(time_s: Callable[[int, int], float], workers: Sequence[int], items: int) -> float:
    """Return the least time by which the `workers` take `items` together, when `time_s(worker, count)` is the time of
    one worker for its share, never less for more.
    """
    queue = [(time_s(worker, 1), worker, 1) for worker in workers]
    heapq.heapify(queue)
    latest_s = 0.0
    for _ in range(items):
        taken_s, worker, count = queue[0]
        latest_s = max(latest_s, taken_s)
        heapq.heapreplace(queue, (time_s(worker, count + 1), worker, count + 1))
    return latest_s


def least_time_of_best_s(time_s: Callable[[int, int], float], workers: Sequence[int], chosen: int, items: int) -> float:
    """Return the same where only `chosen` of the workers may be used, whichever are best."""
    low_s, high_s = 0.0, sorted(time_s(worker, items) for worker in workers)[0]
    while high_s - low_s > 1e-6 * high_s:
        middle_s = (low_s + high_s) / 2
        shares = sorted((_most_items(time_s, worker, middle_s, items) for worker in workers), reverse=True)
        low_s, high_s = (low_s, middle_s) if sum(shares[:chosen]) >= items else (middle_s, high_s)
    return low_s


def _most_items(time_s: Callable[[int, int], float], worker: int, limit_s: float, items: int) -> int:
    """Return the most items, up to `items`, that the worker can take within the limit."""
    low, high = 0, items
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if time_s(worker, middle) <= limit_s else (low, middle - 1)
    return low
