"""Copies of stages in the memory of another node."""

import errno
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial

import pytest
import torch
from random_plans import random_plan

from skippipe.membership.download import Source, fetch
from skippipe.membership.epoch import Member
from skippipe.membership.exchange import Exchange
from skippipe.membership.keys import run_keys
from skippipe.planning.copied_stages import keepers
from skippipe.training.recovery.stage_copies import LABEL_OF, CopyLabel, StageCopies, kept_name, offered_name
from skippipe.training.recovery.stage_state import StageState
from skippipe_scheduler.options import SolveOptions
from skippipe_scheduler.solver.lost_nodes import replan_without

KEYS = run_keys("the secret of these copies")
PLAN = random_plan(2, num_nodes=4, num_stages=3, route_length=2, num_microbatches=4, layers_per_stage=2)
HOLDER, KEEPER = "node-2", "node-3"


def state(step: int) -> StageState:
    return StageState(step, 1.5, {"weight": torch.full((2, 3), float(step))}, {"weight.exp_avg": torch.ones(2, 3)})


def members_at(ports: Mapping[str, int]) -> dict[str, Member]:
    """Return all nodes as members; the exchange of each is at its port, 1 where nobody is asked."""
    return {
        node: Member(name=node, host="127.0.0.1", port=1, incarnation="0" * 32, data_port=ports.get(node, 1))
        for node in PLAN.nodes
    }


@contextmanager
def holder_and_keeper(
    theirs: Exchange, own: Exchange, every: int, silence_s: float
) -> Iterator[tuple[StageCopies, StageCopies]]:
    """Yield the copies of the process that holds stage 2, with the exchange `theirs`, and of the one that keeps it.

    Closes the exchanges, too.
    """
    members = members_at({HOLDER: theirs.port, KEEPER: own.port})
    with (
        closing(theirs),
        closing(own),
        closing(StageCopies(theirs, PLAN.nodes, every, silence_s)) as holder,
        closing(StageCopies(own, PLAN.nodes, every, silence_s)) as keeper,
    ):
        keeper.begin_epoch(PLAN, members, KEEPER)
        holder.begin_epoch(PLAN, members, HOLDER)
        yield holder, keeper


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def kept_step(source: Source) -> int | None:
    """Return the step of the copy of stage 2 that somebody keeps."""
    label = fetch(source, KEYS, LABEL_OF + kept_name(2), 1.0)
    return None if label is None else CopyLabel.from_bytes(label).step


def test_the_state_of_a_stage_comes_back_from_its_bytes() -> None:
    found = StageState.from_bytes(state(7).to_bytes())
    assert (found.step, found.elapsed_s) == (7, 1.5)
    assert torch.equal(found.parameters["weight"], torch.full((2, 3), 7.0))
    assert list(found.optimizer) == ["weight.exp_avg"]


def test_only_stages_of_one_holder_are_copied_and_never_to_that_one() -> None:
    roles = keepers(PLAN, PLAN.nodes)
    assert roles == {1: ("node-3", "node-0"), 2: (HOLDER, KEEPER)}
    smaller = replan_without(PLAN, ["node-1"], SolveOptions(max_evaluations=1))
    assert keepers(smaller, PLAN.nodes)[0] == ("node-0", HOLDER)


class WatchedExchange(Exchange):
    """Notes which label others find at the moment when a content takes the place of another."""

    def __init__(self) -> None:
        super().__init__(KEYS)
        self.found: list[bytes | None] = []

    def offer_made(self, name: str, make: Callable[[], bytes | memoryview]) -> None:
        super().offer_made(name, make)
        self.found.append(fetch(Source("127.0.0.1", self.port), KEYS, LABEL_OF + name, 1.0))


def test_no_label_of_the_copy_before_is_found_beside_a_new_one() -> None:
    with closing(WatchedExchange()) as exchange:
        members = members_at(dict.fromkeys(PLAN.nodes, exchange.port))
        with closing(StageCopies(exchange, PLAN.nodes, 5, silence_s=1.0)) as copies:
            copies.begin_epoch(PLAN, members, HOLDER)
            for step in (1, 6):
                copies.between_steps(step, partial(state, step))
        assert exchange.found == [None, None]


class FailingExchange(Exchange):
    """Cannot ask anybody at first, and then gets an answer that is no label."""

    def __init__(self) -> None:
        super().__init__(KEYS)
        self.failures: list[Callable[[], bytes]] = [self._no_descriptors, lambda: b"?"]

    def fetch(
        self, source: Source, name: str, silence_s: float, wanted: Callable[[], bool] = lambda: True
    ) -> bytes | None:
        if self.failures and name.startswith(LABEL_OF):
            return self.failures.pop(0)()
        return super().fetch(source, name, silence_s, wanted)

    def _no_descriptors(self) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files")


def test_the_keeper_outlives_what_fails_once() -> None:
    own = FailingExchange()
    with holder_and_keeper(Exchange(KEYS), own, 1, silence_s=1.0) as (holder, _):
        limit_s = time.monotonic() + 20

        def check() -> None:
            assert time.monotonic() < limit_s, "the copy is never kept"

        holder.before_sum(1, partial(state, 1), check)
        assert own.failures == []


class HeldUpExchange(Exchange):
    """Gives no copy away while `held_up`."""

    def __init__(self) -> None:
        super().__init__(KEYS)
        self.held_up = True

    def _answer(self, question: list[bytes]) -> list[bytes | memoryview] | None:
        answer = super()._answer(question)
        return None if self.held_up and json.loads(question[0])[0] == offered_name(2) else answer


def test_a_copy_on_its_way_is_not_replaced(caplog: pytest.LogCaptureFixture) -> None:
    theirs = HeldUpExchange()
    with holder_and_keeper(theirs, Exchange(KEYS), 5, silence_s=20.0) as (holder, keeper):
        holder.between_steps(1, partial(state, 1))
        wait_until(lambda: theirs.asked_after(offered_name(2), LABEL_OF + offered_name(2)))
        for step in range(2, 20):
            holder.between_steps(step, partial(state, step))
        assert [message for message in caplog.messages if "longer to send than 5 steps" in message] != []
        assert len(caplog.messages) == 1
        theirs.held_up = False
        wait_until(lambda: keeper.kept_steps == {2: 1})
        wait_until(lambda: not theirs.asked_after(offered_name(2), LABEL_OF + offered_name(2)))
        holder.between_steps(20, partial(state, 20))
        wait_until(lambda: keeper.kept_steps == {2: 20})


def test_a_copy_is_kept_until_the_next_keeper_has_one() -> None:
    coming = [KEEPER]  # until it has come, node-0 keeps the copy
    assert keepers(PLAN, [node for node in PLAN.nodes if node not in coming])[2] == (HOLDER, "node-0")
    with ExitStack() as stack:
        exchanges = {node: stack.enter_context(closing(Exchange(KEYS))) for node in (HOLDER, KEEPER, "node-0")}
        members = members_at({node: exchange.port for node, exchange in exchanges.items()})
        holder, keeper, before = (
            stack.enter_context(closing(StageCopies(exchanges[node], PLAN.nodes, 5, silence_s=1.0)))
            for node in (HOLDER, KEEPER, "node-0")
        )

        for copies, node in ((holder, HOLDER), (before, "node-0")):
            copies.begin_epoch(PLAN, members, node, coming)
        holder.between_steps(400, partial(state, 400))
        wait_until(lambda: before.kept_steps == {2: 400})
        for copies, node in ((holder, HOLDER), (before, "node-0")):
            copies.begin_epoch(PLAN, members, node)
        time.sleep(1.5)  # the one that has come has nothing yet, however often it is asked
        assert before.kept_steps == {2: 400}
        keeper.begin_epoch(PLAN, members, KEEPER)
        holder.between_steps(401, partial(state, 401))
        wait_until(lambda: keeper.kept_steps == {2: 401})
        wait_until(lambda: before.kept_steps == {})
        assert kept_step(Source("127.0.0.1", exchanges["node-0"].port)) is None


def test_the_keeper_has_the_newest_copy_and_keeps_it_when_the_holder_is_lost() -> None:
    with ExitStack() as stack:
        exchanges = {node: stack.enter_context(closing(Exchange(KEYS))) for node in (HOLDER, KEEPER, "node-0")}
        members = {
            node: Member(
                name=node,
                host="127.0.0.1",
                port=1,
                incarnation=f"{number:032x}",
                data_port=exchanges[node].port if node in exchanges else 1,
            )
            for number, node in enumerate(PLAN.nodes)
        }
        copies = {}
        for node in (HOLDER, KEEPER):
            made = StageCopies(exchanges[node], PLAN.nodes, 5, silence_s=1.0)
            copies[node] = stack.enter_context(closing(made))
            made.begin_epoch(PLAN, members, node)
        for step in range(1, 9):  # copied after steps 1 and 6
            copies[HOLDER].between_steps(step, partial(state, step))
        source = Source("127.0.0.1", exchanges[KEEPER].port)
        wait_until(lambda: kept_step(source) == 6)
        assert copies[KEEPER].absent_states == {}
        lost = replan_without(PLAN, [HOLDER], SolveOptions(max_evaluations=1), lost_stage="routes_around")
        copies[KEEPER].begin_epoch(lost, members, KEEPER)
        assert [(stage, kept.step) for stage, kept in copies[KEEPER].absent_states.items()] == [(2, 6)]
        content = fetch(source, KEYS, kept_name(2), 1.0)
        assert content is not None
        assert StageState.from_bytes(content).step == 6
