"""What the nodes of a run did in its last steps: kept on rank 0, from what every rank measures of itself in a step."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Final, NamedTuple

from skippipe.monitor.live.run_status import LinkStatus, NodeStatus, slowest_of
from skippipe_scheduler.problem.memory import GIB

WINDOW: Final = 20
"""Steps over which shares of time are taken."""


class NodeReading(NamedTuple):
    """What one process measures of itself in a step; it goes with the one sum of all ranks."""

    pace: float
    """Time of its tasks over that of the plan; 0 where it had none."""
    busy_s: float
    """Time spent in tasks."""
    waiting_s: float
    """Time for which it stood still for messages."""
    peak_bytes: float
    """Most memory so far, as in the plan's estimate."""
    process_bytes: float
    """Resident memory of the process."""
    device_bytes: float
    """What torch holds of the GPU's memory; 0 on a CPU."""


class NodeFacts(NamedTuple):
    """What the plan says of a node."""

    stages: tuple[int, ...]
    estimated_bytes: int


class NodeBoard:
    """The last steps of one run."""

    def __init__(self) -> None:
        self.plan_hash = ""
        self.link_paces: Mapping[tuple[str, str], float] = {}
        """Measured time of messages over that of the plan, by the two ends of a link in any order."""
        self._steps: deque[tuple[float, Mapping[str, NodeReading]]] = deque(maxlen=WINDOW)
        self._facts: Mapping[str, NodeFacts] = {}
        self._links: Sequence[LinkStatus] = ()

    def begin_plan(self, plan_hash: str, facts: Mapping[str, NodeFacts], links: Sequence[LinkStatus]) -> None:
        """Begin with a plan; `facts` are of all present members, `links` as they were planned."""
        self._steps.clear()
        self.plan_hash, self._facts, self._links, self.link_paces = plan_hash, facts, links, {}

    def observe(self, duration_s: float, readings: Mapping[str, NodeReading]) -> None:
        """Take what nodes have measured in a step of `duration_s`."""
        self._steps.append((duration_s, readings))

    @property
    def nodes(self) -> tuple[NodeStatus, ...]:
        """Those that took part in the last step and are still there."""
        newest = self._steps[-1][1] if self._steps else {}
        return tuple(self._status(node, reading) for node, reading in newest.items() if node in self._facts)

    @property
    def links(self) -> tuple[LinkStatus, ...]:
        """Those of the plan, with what was measured of them."""
        paces = self.link_paces
        return tuple(link.model_copy(update={"pace": paces.get(link.nodes)}) for link in self._links)

    def metrics(self) -> dict[str, float | str]:
        """Return the same as metrics of each node and link, under their names, and which node is the slowest."""
        nodes = self.nodes
        entries: dict[str, float | str] = {
            f"nodes/{node.node}/{key}": value for node in nodes for key, value in _metrics_of(node)
        }
        entries |= {f"links/{' - '.join(link.nodes)}/pace": link.pace for link in self.links if link.pace is not None}
        slowest = slowest_of(nodes)
        return entries if slowest is None else entries | {"nodes/slowest": slowest.node}

    def _status(self, node: str, newest: NodeReading) -> NodeStatus:
        steps = [(duration_s, readings[node]) for duration_s, readings in self._steps if node in readings]
        whole_s = sum(duration_s for duration_s, _ in steps)
        paces = [reading.pace for _, reading in steps if reading.pace > 0]
        facts = self._facts[node]
        busy_share = _share(sum(reading.busy_s for _, reading in steps), whole_s)
        waiting_share = _share(sum(reading.waiting_s for _, reading in steps), whole_s)
        return NodeStatus(
            node=node,
            stages=facts.stages,
            busy_share=busy_share,
            waiting_share=min(waiting_share, 1 - busy_share),  # emulated tasks go on while messages are awaited
            pace=median(paces) if paces else None,
            process_bytes=round(newest.process_bytes),
            device_bytes=round(newest.device_bytes) or None,
            peak_bytes=round(newest.peak_bytes),
            estimated_bytes=facts.estimated_bytes,
        )


def _share(part_s: float, whole_s: float) -> float:
    return min(1.0, part_s / whole_s) if whole_s > 0 else 0.0


def _metrics_of(node: NodeStatus) -> Iterator[tuple[str, float]]:
    yield "busy_share", node.busy_share
    yield "waiting_share", node.waiting_share
    yield "memory_gib", node.process_bytes / GIB
    if node.device_bytes is not None:
        yield "device_memory_gib", node.device_bytes / GIB
    if node.pace is not None:
        yield "pace", node.pace
