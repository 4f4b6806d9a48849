"""The plans that one run alternates between, iteration by iteration.

All of them share what a rank cannot change between two steps: its node, its stage with its layers, and the number of
microbatches. Routes, order and predicted times are each plan's own, so that nothing moves when the plan changes.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from skippipe.errors import PlanError
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.recost import NodePair, at_pace

Key = TypeVar("Key")
MAIN_PLAN = "main"
"""Name of the main plan in its set."""
JOINING_PLAN = "joining"
"""Name of the plan of an epoch's first iteration, in which nodes that have come get the state of their stage."""


@dataclass(frozen=True)
class PlanSet:
    """The main plan and further ones by name; raises `PlanError` where one does not fit the main plan."""

    main: Plan
    further: Mapping[str, Plan] = field(default_factory=dict)
    pace: Mapping[str, float] = field(default_factory=dict)
    """By what factor the tasks of a node take longer than was assumed when the run began, as measured (1 where not
    given). It is in the plans' costs."""
    link_pace: Mapping[NodePair, float] = field(default_factory=dict)
    """The same of messages from one node to another."""

    def __post_init__(self) -> None:
        for name, plan in self.further.items():
            difference = placement_difference(self.main, plan)
            if difference is not None:
                raise PlanError(
                    f"plan {name!r} has other {difference} than the main plan; the plans of a run share these"
                )

    @classmethod
    def of(cls, plans: "Plan | PlanSet") -> "PlanSet":
        """Return a set as it is, and a plan as a set of one."""
        return plans if isinstance(plans, PlanSet) else cls(plans)

    def __getitem__(self, name: str) -> Plan:
        if name == MAIN_PLAN:
            return self.main
        if name not in self.further:
            raise PlanError(f"there is no plan {name!r} in this run; it has {', '.join(map(repr, self))}")
        return self.further[name]

    def __iter__(self) -> Iterator[str]:
        """Give the names, the main plan's first."""
        yield MAIN_PLAN
        yield from self.further

    def __len__(self) -> int:
        return 1 + len(self.further)

    def items(self) -> Iterator[tuple[str, Plan]]:
        """Give names and plans, the main plan first."""
        return ((name, self[name]) for name in self)

    def replaced(self, plans: Mapping[str, Plan]) -> "PlanSet":
        """Return a set of these plans, by the same names and at the same paces."""
        further = {name: plan for name, plan in plans.items() if name != MAIN_PLAN}
        return replace(self, main=plans[MAIN_PLAN], further=further)

    def in_rank_order(self, nodes: Sequence[str]) -> "PlanSet":
        """Return the same plans for ranks that hold their nodes in the order of `nodes`."""
        return self.replaced({name: _in_rank_order(plan, nodes) for name, plan in self.items()})

    def at_pace(self, factors: Mapping[str, float], links: Mapping[NodePair, float] | None = None) -> "PlanSet":
        """Return the same plans, exactly timed, where tasks of each node take `factors[node]` times as long.

        And messages from one node to another `links[source, destination]` times.
        """
        stretch = links or {}
        if not factors and not stretch:
            return self
        paced = self.replaced({name: at_pace(plan, factors, stretch) for name, plan in self.items()})
        return replace(paced, pace=_times(self.pace, factors), link_pace=_times(self.link_pace, stretch))

    def link_pace_from(self, node: str) -> dict[str, float]:
        """Return the `link_pace` of messages from a node, by their destination."""
        return {sink: pace for (source, sink), pace in self.link_pace.items() if source == node}

    @property
    def joining(self) -> Plan | None:
        """The plan of the first iteration, where that is another one."""
        return self.further.get(JOINING_PLAN)

    def with_joining(self, plan: Plan) -> "PlanSet":
        """Return the set with a plan of the first iteration."""
        return replace(self, further={**self.further, JOINING_PLAN: plan})

    @property
    def hash(self) -> str:
        """The main plan's hash where it is alone, else one over all names and hashes; of all steps but the first."""
        hashes = [(name, plan.hash) for name, plan in self.items() if name != JOINING_PLAN]
        if len(hashes) == 1:
            return self.main.hash
        text = json.dumps(hashes)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """Return the set as text, for the other ranks."""
        plans = {name: plan.to_json() for name, plan in self.items()}
        link_pace = [[*pair, pace] for pair, pace in self.link_pace.items()]
        return json.dumps({"plans": plans, "pace": {**self.pace}, "link_pace": link_pace})

    @classmethod
    def from_json(cls, text: str) -> "PlanSet":
        """Return the set that `to_json` has written."""
        content = json.loads(text)
        plans = {name: Plan.model_validate_json(plan) for name, plan in content["plans"].items()}
        link_pace = {(source, sink): pace for source, sink, pace in content["link_pace"]}
        return cls(plans.pop(MAIN_PLAN), plans, content["pace"], link_pace)


def _times(one: Mapping[Key, float], other: Mapping[Key, float]) -> dict[Key, float]:
    return {key: one.get(key, 1.0) * other.get(key, 1.0) for key in {**one, **other}}


def _in_rank_order(plan: Plan, nodes: Sequence[str]) -> Plan:
    if tuple(nodes) == plan.nodes:
        return plan
    region_of = None if plan.regions is None else dict(zip(plan.nodes, plan.regions, strict=True))
    regions = None if region_of is None else tuple(region_of[node] for node in nodes)
    fields = {name: getattr(plan, name) for name in Plan.model_fields}
    return Plan(**fields | {"nodes": tuple(nodes), "regions": regions})  # a copy would keep the ranks before


def placement_difference(main: Plan, plan: Plan) -> str | None:
    """Return in what `plan` differs from `main` that plans of a run must share, or None."""
    comparisons = {
        "nodes": (main.nodes, plan.nodes),
        "stages": (main.stages, plan.stages),
        "microbatches": (len(main.microbatches), len(plan.microbatches)),
    }
    return next((name for name, (wanted, found) in comparisons.items() if wanted != found), None)
