"""When another plan is to be looked for: how long tasks take on each node, beside what the plan assumes of all of them.

Pure: figures in, a decision out. The pace of a node in a step is the time of its tasks over that of the plan. It is set
beside the median of all nodes in that step: what slows all of them down alike, and plans whose seconds are all off by
the same factor, cancel out. Estimates are medians over a window of steps, so that single steps count for nothing.
Inside, paces are logarithms: twice as long is as far away as half as long. Links and their messages are watched alike.
"""

import math
from collections import deque
from collections.abc import Collection, Hashable, Mapping, Sequence
from statistics import median
from typing import Generic, TypeVar

from skippipe.config.recovery_options import ReplanOptions

Key = TypeVar("Key", bound=Hashable)
"""A node, or a link as its two ends."""


class PaceWatch(Generic[Key]):
    """The paces of the nodes, or of the links, of one plan.

    A node has changed for good where its estimate has been off by more than the threshold in every step of a window.
    """

    def __init__(self, nodes: Sequence[Key], options: ReplanOptions, *, after_change: bool = False) -> None:
        """Begin with a new plan; `after_change` where it has replaced another one, so that it stays for a while."""
        self._options = options
        self._pauses = after_change
        self._paused_until = 0
        self._known: Mapping[Key, float] = {}
        self._seen: Mapping[Key, deque[float]] = {node: deque(maxlen=options.window) for node in nodes}
        self._usual: deque[float] = deque(maxlen=options.window)
        self._steps_off = dict.fromkeys(nodes, 0)

    def observe(self, step: int, paces: Sequence[float]) -> bool:
        """Take the pace of each node in a step, 0 where it had no task; return whether to look for another plan now."""
        if self._pauses:
            self._pauses, self._paused_until = False, step + self._options.pause
        logs = {node: math.log(pace) for node, pace in zip(self._seen, paces, strict=True) if pace > 0}
        usual = _median(logs.values())
        self._usual.append(usual)
        for node, log in logs.items():
            self._seen[node].append(log - usual)
        threshold = math.log(self._options.threshold)
        for node, change in self._changes().items():
            self._steps_off[node] = self._steps_off[node] + 1 if abs(change) > threshold else 0
        return step >= self._paused_until and max(self._steps_off.values(), default=0) >= self._options.window

    @property
    def estimates(self) -> dict[Key, float]:
        """By what factor the tasks of each node take longer than planned; as much as the others where it has none."""
        return dict.fromkeys(self._seen, math.exp(_median(self._usual))) | self.measured

    @property
    def measured(self) -> dict[Key, float]:
        """The same of those nodes alone that have an estimate."""
        usual = _median(self._usual)
        return {node: math.exp(usual + estimate) for node, estimate in self._estimates().items()}

    @property
    def changed(self) -> dict[Key, float]:
        """Nodes that have become slower or faster for good, with the factor beside plan and other nodes."""
        changes, window = self._changes(), self._options.window
        return {node: math.exp(changes[node]) for node, steps in self._steps_off.items() if steps >= window}

    def settle(self, step: int) -> None:
        """Take the present paces for known, and wait for a pause: a plan for them was looked for."""
        self._known = self._estimates()
        self._steps_off = dict.fromkeys(self._steps_off, 0)
        self._paused_until = step + self._options.pause

    def is_worth_it(self, present_s: float, other_s: float) -> bool:
        """Return whether an iteration of `other_s` is so much shorter than one of `present_s` that plans change."""
        return other_s <= (1 - self._options.gain) * present_s

    def _estimates(self) -> dict[Key, float]:
        """Return the estimate of each node that has one, beside the median of all."""
        return {node: _median(seen) for node, seen in self._seen.items() if len(seen) == self._options.window}

    def _changes(self) -> dict[Key, float]:
        """Return the estimates beside those that are known; who has stayed is at 0, whoever the median was."""
        found = {node: estimate - self._known.get(node, 0.0) for node, estimate in self._estimates().items()}
        usual = _median(found.values())
        return {node: change - usual for node, change in found.items()}


def _median(logs: Collection[float]) -> float:
    return median(logs) if logs else 0.0
