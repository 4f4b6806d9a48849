"""A trace of other machines than a plan's nodes: how many of them there are decides how many of the nodes are."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from skippipe.errors import InputError
from skippipe.planning.churn.failure_trace import FailureTrace, make_trace
from skippipe_scheduler.plan.plan import Plan


class MachineChange(NamedTuple):
    """How many machines go and come at one instant."""

    time_s: float
    gone: int
    come: int


def counts_as_changes(counts: Sequence[tuple[float, int]]) -> list[MachineChange]:
    """Return what happens between samples of (seconds, number of machines), in the order of time."""
    ordered = sorted(counts, key=lambda sample: sample[0])
    before = [0, *(count for _, count in ordered)]
    return [
        MachineChange(time_s, max(0, last - count), max(0, count - last))
        for (time_s, count), last in zip(ordered, before, strict=False)
    ]


def on_nodes(
    machines: Sequence[MachineChange], plan: Plan, source: str, *, duration_s: float | None = None, seed: int = 0
) -> FailureTrace:
    """Return the trace of a plan's nodes, of which as large a share is there as of the machines at their most.

    It begins when there are the most machines for the first time, and ends with the last row where no `duration_s` is
    given. Which nodes are lost is drawn from the seed. A
    machine that comes takes the place of the lost node whose stage has the smallest share of its nodes left, as
    somebody would choose who brings a machine; of several, of the one that has been away for longest.
    """
    counts: list[int] = []
    for change in machines:
        counts.append((counts[-1] if counts else 0) - change.gone + change.come)
        if counts[-1] < 0:
            raise InputError(f"{source}: more machines have gone than had come at {change.time_s:g} s")
    most = max(counts, default=0)
    if most == 0:
        raise InputError(f"{source}: there is never a machine in this trace")
    first = counts.index(most)
    generator = random.Random(seed)
    begin_s, count, away = machines[first].time_s, most, list[str]()
    events: list[tuple[float, str, bool]] = []
    for change in machines[first + 1 :]:
        time_s = change.time_s - begin_s
        for moved in (-change.gone, change.come):
            count += moved
            wanted = count * len(plan.nodes) // most
            while len(plan.nodes) - len(away) > wanted:
                away.append(generator.choice([node for node in plan.nodes if node not in away]))
                events.append((time_s, away[-1], False))
            while len(plan.nodes) - len(away) < wanted:
                node = _most_needed(plan, away)
                away.remove(node)
                events.append((time_s, node, True))
    end_s = machines[-1].time_s - begin_s if duration_s is None else duration_s
    return make_trace(events, plan.nodes, end_s, source)


def _most_needed(plan: Plan, away: Sequence[str]) -> str:
    """Return the node, of those away, that comes back first."""

    def share_left(node: str) -> float:
        nodes = plan.stages[plan.stage_of[node]].nodes
        return sum(other not in away for other in nodes) / len(nodes)

    return min(away, key=share_left)
