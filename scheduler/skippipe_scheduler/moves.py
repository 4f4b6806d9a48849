"""Small changes of routes that keep every microbatch's origin, its route length and the visits of the
stages.
"""

import random
from collections import defaultdict
from collections.abc import Callable

from skippipe_scheduler.slots import Layout, SlotRoute

Routes = list[SlotRoute]
Move = Callable[[Routes, list[int], random.Random], None]


class Moves:
    """Random changes of the routes of a few chosen microbatches, in place."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.uniform = layout.problem.rules.uniform_coverage
        self.legal = frozenset(layout.sequences)
        self.by_stages: dict[frozenset[int], list[tuple[int, ...]]] = defaultdict(list)
        for sequence in layout.sequences:
            self.by_stages[frozenset(sequence)].append(sequence)
        self.all: tuple[Move, ...] = (
            self.exchange_slots,
            self.exchange_slots,
            self.replace_slot,
            self.exchange_tails,
            self.exchange_stages,
            self.reorder,
            self.copy_sibling,
        )

    def apply(self, routes: Routes, chosen: list[int], rng: random.Random) -> Routes:
        """Return `routes` after one random move on `chosen` microbatches, or unchanged if it would break a
        rule.
        """
        changed = list(routes)
        rng.choice(self.all)(changed, chosen, rng)
        return changed if self.layout.covers(changed) else routes

    def stages(self, route: SlotRoute) -> tuple[int, ...]:
        """Return the stage sequence of a route."""
        return tuple(self.layout.stage_of[slot] for slot in route)

    def exchange_slots(self, routes: Routes, chosen: list[int], rng: random.Random) -> None:
        """Two microbatches exchange the replicas they use of one stage that both visit."""
        if len(chosen) < 2:
            return
        one, two = rng.sample(chosen, 2)
        here = {self.layout.stage_of[slot]: slot for slot in routes[two][1:]}
        shared = [slot for slot in routes[one][1:] if here.get(self.layout.stage_of[slot], slot) != slot]
        if shared:
            left = rng.choice(shared)
            right = here[self.layout.stage_of[left]]
            routes[one] = tuple(right if slot == left else slot for slot in routes[one])
            routes[two] = tuple(left if slot == right else slot for slot in routes[two])

    def replace_slot(self, routes: Routes, chosen: list[int], rng: random.Random) -> None:
        """A microbatch takes another replica of a stage."""
        one = rng.choice(chosen)
        hop = rng.randrange(1, len(routes[one]))
        other = rng.choice(self.layout.slots_of[self.layout.stage_of[routes[one][hop]]])
        routes[one] = (*routes[one][:hop], other, *routes[one][hop + 1 :])

    def exchange_tails(self, routes: Routes, chosen: list[int], rng: random.Random) -> None:
        """Two microbatches exchange all but their origins."""
        if len(chosen) >= 2:
            one, two = rng.sample(chosen, 2)
            head, other = routes[one][0], routes[two][0]
            routes[one], routes[two] = (head, *routes[two][1:]), (other, *routes[one][1:])

    def exchange_stages(self, routes: Routes, chosen: list[int], rng: random.Random) -> None:
        """One microbatch gives a stage visit for one of another's (or, where coverage allows, for any
        stage).
        """
        stage_of = self.layout.stage_of
        one = rng.choice(chosen)
        mine = set(self.stages(routes[one]))
        gives = rng.choice(routes[one][1:])
        if not self.uniform or len(chosen) < 2 or rng.random() < 0.2:
            others = [slot for slot, stage in enumerate(stage_of) if stage not in mine]
            if others:
                self._swap_in(routes, one, gives, rng.choice(others), rng)
            return
        two = rng.choice(chosen)
        takes = [slot for slot in routes[two][1:] if stage_of[slot] not in mine]
        if two != one and takes and stage_of[gives] not in self.stages(routes[two]):
            taken = rng.choice(takes)
            self._swap_in(routes, one, gives, taken, rng)
            self._swap_in(routes, two, taken, gives, rng)

    def _swap_in(self, routes: Routes, one: int, leaves: int, enters: int, rng: random.Random) -> None:
        self._arrange(routes, one, [enters if slot == leaves else slot for slot in routes[one]], rng)

    def _arrange(self, routes: Routes, one: int, slots: list[int], rng: random.Random) -> None:
        by_stage = {self.layout.stage_of[slot]: slot for slot in slots}
        sequences = self.by_stages.get(frozenset(by_stage))
        if sequences:
            routes[one] = tuple(by_stage[stage] for stage in rng.choice(sequences))

    def reorder(self, routes: Routes, chosen: list[int], rng: random.Random) -> None:
        """A microbatch visits the same slots in another legal order."""
        one = rng.choice(chosen)
        self._arrange(routes, one, list(routes[one]), rng)

    def copy_sibling(self, routes: Routes, chosen: list[int], rng: random.Random) -> None:
        """A microbatch exchanges its slots for those a sibling of the same origin uses, stage by stage."""
        one = rng.choice(chosen)
        siblings = [route for route in routes if route[0] == routes[one][0] and route != routes[one]]
        if siblings:
            theirs = {self.layout.stage_of[slot]: slot for slot in rng.choice(siblings)}
            routes[one] = tuple(theirs.get(self.layout.stage_of[slot], slot) for slot in routes[one])
