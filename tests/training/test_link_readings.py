"""Links that have become slow are read from what both ends have traced, and another plan leaves them."""

import time
from collections.abc import Mapping
from contextlib import closing

import pytest
from random_plans import random_plan
from simulated_trace import simulated_trace

from skippipe.cluster.run_trace import Trace, watched_links
from skippipe.config.recovery_options import ReplanOptions
from skippipe.errors import CommunicationError
from skippipe.membership.epoch import Member
from skippipe.runtime.plans.plan_set import PlanSet
from skippipe.runtime.runner import Span, TransferWait
from skippipe.training.measurement.step_trace import TracedStep
from skippipe.training.recovery.plans.better_plans import READINGS, BetterPlanSearch
from skippipe.training.recovery.plans.link_readings import TRACED, LinkReadings, packed, unpacked
from skippipe_scheduler.plan.plan import Plan
from skippipe_scheduler.plan.recost import NodePair, at_pace
from skippipe_scheduler.plan.simulate import simulate

STEP = 7
LIMIT_S = 60.0


@pytest.fixture(scope="module")
def plan() -> Plan:
    return random_plan(2, num_nodes=6, num_stages=3, route_length=2, num_microbatches=12)


def traced(trace: Trace, node: str) -> TracedStep:
    spans = [Span(*task[1:]) for task in trace.tasks if task.node == node]
    waits = [
        TransferWait(wait.source, wait.destination, wait.microbatch, 0, wait.direction, wait.start_s, wait.end_s)  # type: ignore[arg-type]  # of a plan
        for wait in trace.waits
        if wait.destination == node
    ]
    return TracedStep(STEP, [*spans, *waits])


def readings_of(plan: Plan, real: Plan, silent: str = "", garbled: str = "") -> LinkReadings:
    """Return readings of a run that is planned as one plan and takes the times of the other."""
    trace = simulated_trace(real, [STEP])

    def fetch(member: Member, name: str) -> bytes:
        if member.name == silent:
            raise CommunicationError("no answer")
        assert name == TRACED
        if member.name == garbled:
            return b"garbage"
        return packed(traced(trace, member.name))

    members = [Member(name=node, host="h", port=1, incarnation="0" * 32) for node in plan.nodes]
    return LinkReadings(plan, members, fetch)


def read(readings: LinkReadings) -> Mapping[NodePair, float]:
    assert readings.take() is None
    readings.begin()
    while (found := readings.take()) is None:
        pass
    readings.close()
    return found


def both_ways(pair: NodePair, factor: float) -> dict[NodePair, float]:
    return {pair: factor, pair[::-1]: factor}


def test_a_slow_link_is_read_and_the_others_are_as_planned(plan: Plan) -> None:
    links = watched_links(plan)
    assert len(links) > 2
    slow = links[0]
    found = read(readings_of(plan, at_pace(plan, {}, both_ways(slow, 4.0))))
    assert found[slow] == found[slow[::-1]] == pytest.approx(4.0)
    others = [pair for pair in found if {*pair} != {*slow}]
    assert others
    assert [found[pair] for pair in others] == pytest.approx([1.0] * len(others))


def test_a_slow_link_on_which_only_relays_send_one_way_is_read() -> None:
    plan = random_plan(2, num_nodes=6, num_stages=3, route_length=2, num_microbatches=12, relays=0.5)
    computed = {(span.source, span.destination) for span in simulate(plan).transfers if span.maker not in ("RF", "RB")}
    slow = next(pair for pair in read(readings_of(plan, plan)) if not {pair, pair[::-1]} <= computed)
    found = read(readings_of(plan, at_pace(plan, {}, both_ways(slow, 4.0))))
    assert found[slow] == found[slow[::-1]] == pytest.approx(4.0)
    others = [pair for pair in found if {*pair} != {*slow}]
    assert others
    assert [found[pair] for pair in others] == pytest.approx([1.0] * len(others))


def test_a_member_that_gives_no_answer_leaves_its_links_out(plan: Plan) -> None:
    for found in (
        read(readings_of(plan, plan, silent=plan.nodes[0])),
        read(readings_of(plan, plan, garbled=plan.nodes[0])),
    ):
        assert found
        assert not any(plan.nodes[0] in pair for pair in found)


def test_what_is_packed_comes_back(plan: Plan) -> None:
    step = traced(simulated_trace(plan, [STEP]), plan.nodes[1])
    assert unpacked(packed(step)) == step.lines()
    assert len(packed(step)) < len(step.lines()) / 3


def test_short_transfers_are_not_watched(plan: Plan) -> None:
    costs = plan.costs.model_copy(
        update={"transfer_s": {a: dict.fromkeys(row, 1e-4) for a, row in plan.costs.transfer_s.items()}}
    )
    assert watched_links(plan.model_copy(update={"costs": costs})) == []


def test_a_slow_link_is_left_by_another_plan(plan: Plan) -> None:
    options = ReplanOptions(enabled=True, window=4, pause=0, search_s=0.3, niceness=0)
    search, slow = BetterPlanSearch(PlanSet(plan), PlanSet(plan), options), watched_links(plan)[0]
    usual, changed = dict.fromkeys(watched_links(plan), 1.0), {slow: 30.0}
    step, deadline_s = 0, time.monotonic() + LIMIT_S
    with closing(search):
        while search.found is None and time.monotonic() < deadline_s:
            step += 1
            search.observe(step, [1.0] * len(plan.nodes), usual | (changed if step > READINGS else {}))
            time.sleep(0.01)
        assert search.found is not None
        change = search.found.change
        assert [link.nodes for link in change.links] == [slow]
        assert "the link node-" in change.who
        assert change.time_ratio < 0.95
        assert search.found.present.link_pace[slow] == pytest.approx(30.0)
