"""When which nodes of a plan are lost and are back, as given or drawn from a seed."""

import math
import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Self

from skippipe.errors import InputError
from skippipe_scheduler.plan.plan import Plan

SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class NodeChange:
    """What happens at one instant. A node that is lost and back at once has lost what it held in memory."""

    time_s: float
    lost: frozenset[str] = frozenset()
    back: frozenset[str] = frozenset()


@dataclass(frozen=True)
class FailureTrace:
    """Changes in the order of time, from an instant at which all nodes are there to `duration_s`."""

    duration_s: float
    changes: tuple[NodeChange, ...]

    @property
    def num_losses(self) -> int:
        """Instants at which nodes are lost."""
        return sum(bool(change.lost) for change in self.changes)

    @property
    def mtbf_s(self) -> float:
        """Mean seconds between two instants of loss; infinite without any."""
        return self.duration_s / self.num_losses if self.num_losses else math.inf

    def until(self, duration_s: float) -> Self:
        """Return this trace cut, or lengthened with nothing happening."""
        return replace(
            self,
            duration_s=duration_s,
            changes=tuple(change for change in self.changes if change.time_s < duration_s),
        )

    def present_share(self, nodes: Collection[str]) -> float:
        """Return how many of the nodes are there, on the mean over time: no method has more to work with."""
        present, since_s, area_s = len(nodes), 0.0, 0.0
        for change in self.changes:
            area_s += present * (change.time_s - since_s)
            present, since_s = present - len(change.lost) + len(change.back), change.time_s
        return (area_s + present * (self.duration_s - since_s)) / (self.duration_s * len(nodes))


def make_trace(
    events: Iterable[tuple[float, str, bool]], nodes: Collection[str], duration_s: float | None, source: str
) -> FailureTrace:
    """Return the trace of (seconds, node, whether it is back), in any order.

    It ends after `duration_s`, or with its last event where None. Raises `InputError` for an unknown node, for one that
    is lost or back twice in a row, and for a trace without length; `source` begins the message.
    """
    ordered = sorted(events, key=lambda event: event[0])
    end_s = duration_s if duration_s is not None else max((time_s for time_s, _, _ in ordered), default=0.0)
    if not 0 < end_s < math.inf:
        raise InputError(f"{source}: the trace is {end_s:g} s long; it needs an end after its start")
    away: set[str] = set()
    changes: list[NodeChange] = []
    for time_s, node, is_back in ordered:
        if node not in nodes:
            raise InputError(f"{source}: the plan has no node {node!r}; it has {', '.join(nodes)}")
        if time_s < 0 or (node in away) != is_back:
            state = "before the trace begins" if time_s < 0 else "there already" if is_back else "lost already"
            raise InputError(
                f"{source}: {node!r} is {'back' if is_back else 'lost'} at {time_s:g} s, but it is {state}"
            )
        (away.discard if is_back else away.add)(node)
        if time_s < end_s:
            changes = _with_event(changes, time_s, node, is_back)
    return FailureTrace(end_s, tuple(changes))


def _with_event(changes: list[NodeChange], time_s: float, node: str, is_back: bool) -> list[NodeChange]:
    """Add an event to the last change where it is at the same instant, and to one of its own otherwise."""
    last = changes[-1] if changes and changes[-1].time_s == time_s else NodeChange(time_s)
    if not is_back and node in last.back:
        last = NodeChange(time_s)
    elif changes and last is changes[-1]:
        changes = changes[:-1]
    if is_back:
        return [*changes, replace(last, back=last.back | {node})]
    return [*changes, replace(last, lost=last.lost | {node})]


def drawn_losses(
    nodes: Sequence[str], mtbf_s: float, duration_s: float, *, rejoin_s: float = math.inf, seed: int = 0
) -> FailureTrace:
    """Draw a trace in which a node is lost every `mtbf_s` on the mean, by a Poisson process over the whole run.

    Each time it is any of the nodes that are there; it is back after `rejoin_s`.
    """
    generator = random.Random(seed)
    back_s: dict[str, float] = {}
    events: list[tuple[float, str, bool]] = []
    time_s = generator.expovariate(1 / mtbf_s)
    while time_s < duration_s:
        present = [node for node in nodes if back_s.get(node, 0.0) <= time_s]
        if present:
            node = generator.choice(present)
            back_s[node] = time_s + rejoin_s
            events += [(time_s, node, False), (back_s[node], node, True)]
        time_s += generator.expovariate(1 / mtbf_s)
    return make_trace(events, nodes, duration_s, "drawn losses")


def drawn_stage_losses(
    plan: Plan, hourly_share: float, duration_s: float, *, rejoin_s: float, seed: int = 0
) -> FailureTrace:
    """Draw a trace in which within an hour, with this probability, all nodes of one stage are lost at once.

    That is how CheckFree draws its failures (its repository, `failure_generator.py`): one stage at a time, any but the
    first, no matter how many there are. Its nodes are back after `rejoin_s`.
    """
    generator = random.Random(seed)
    rate_per_s = -math.log1p(-hourly_share) / SECONDS_PER_HOUR
    events: list[tuple[float, str, bool]] = []
    time_s = generator.expovariate(rate_per_s)
    while time_s < duration_s:
        stage = generator.choice(plan.stages[1:])
        for node in stage.nodes:
            events += [(time_s, node, False), (time_s + rejoin_s, node, True)]
        time_s = max(time_s + generator.expovariate(rate_per_s), math.nextafter(time_s + rejoin_s, math.inf))
    return make_trace(events, plan.nodes, duration_s, "drawn losses of stages")
