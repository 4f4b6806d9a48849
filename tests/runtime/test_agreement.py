"""What one rank cannot do, none does, and all say why: the same class and exit code, and the rank's number."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore

from skippipe.errors import CommunicationError, ConfigError, InfeasibleError, PeerLostError, SkipPipeError, StorageError
from skippipe.runtime.ranks import time_limits
from skippipe.runtime.ranks.agreement import all_gather_json, on_all_ranks, on_first_rank
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.remote_errors import error_content, error_elsewhere
from skippipe.runtime.ranks.store_names import Topic

WORLD_SIZE = 3


def on_ranks(call: Callable[[DistributedContext], Any], timeout_s: float = 10.0) -> list[Any]:
    """Return what `call` returns, or the error that it raises, on each rank; all of them share a store."""
    store = HashStore()

    def run(rank: int) -> Any:
        context = DistributedContext(rank, WORLD_SIZE, rank, timeout_s, store)
        try:
            return call(context)
        except Exception as error:
            return error

    with ThreadPoolExecutor(WORLD_SIZE) as pool:
        return list(pool.map(run, range(WORLD_SIZE)))


def failing(rank: int, error: Exception) -> Callable[[DistributedContext], Any]:
    """Return an action over all ranks that raises on one of them."""

    def act(context: DistributedContext) -> str:
        if context.rank == rank:
            raise error
        return f"done on {context.rank}"

    return lambda context: on_all_ranks(context, Topic.START, lambda: act(context))


def test_every_rank_gets_all_answers_again_and_again() -> None:
    def meet(context: DistributedContext) -> list[Any]:
        return [all_gather_json(context, Topic.START, lambda: [context.rank, meeting]) for meeting in range(3)]  # noqa: B023

    expected = [[[rank, meeting] for rank in range(WORLD_SIZE)] for meeting in range(3)]
    assert on_ranks(meet) == [expected] * WORLD_SIZE


def test_results_that_do_not_travel_stay_where_they_are() -> None:
    assert on_ranks(lambda context: on_all_ranks(context, Topic.START, lambda: {context.rank})) == [{0}, {1}, {2}]


def test_rank_0_decides_for_all() -> None:
    asked: list[int] = []

    def choose(context: DistributedContext) -> str:
        asked.append(context.rank)
        return "this way"

    told = on_ranks(lambda context: on_first_rank(context, Topic.PLANS, lambda: choose(context)))
    assert told == ["this way"] * WORLD_SIZE
    assert asked == [0]


@pytest.mark.parametrize(
    "error",
    [InfeasibleError("no plan fits", stage=1), StorageError("the disk is full"), ConfigError("nonsense")],
    ids=lambda error: type(error).__name__,
)
def test_a_failure_is_raised_everywhere_with_its_class_and_the_rank(error: SkipPipeError) -> None:
    first, own, last = on_ranks(failing(1, error))
    assert own is error
    for told in (first, last):
        assert type(told) is type(error)
        assert str(told) == f"rank 1: {error}"
        assert told.exit_code == error.exit_code


def test_an_unexpected_error_is_told_too() -> None:
    own, *others = on_ranks(failing(0, ZeroDivisionError("division by zero")))
    assert isinstance(own, ZeroDivisionError)
    for told in others:
        assert type(told) is SkipPipeError
        assert (str(told), told.exit_code) == ("rank 0: ZeroDivisionError: division by zero", 1)


def test_of_several_failures_each_rank_raises_its_own_else_the_first() -> None:
    def act(context: DistributedContext) -> None:
        raise ConfigError(f"bad on {context.rank}")

    results = on_ranks(
        lambda context: on_all_ranks(context, Topic.START, lambda: act(context) if context.rank else None)
    )
    assert list(map(str, results)) == ["rank 1: bad on 1", "bad on 1", "bad on 2"]


def test_a_check_of_all_answers_fails_alike_everywhere() -> None:
    def check(answers: Any) -> None:
        if answers != [0, 0, 0]:
            raise ConfigError(f"ranks differ: {answers}")

    results = on_ranks(lambda context: all_gather_json(context, Topic.START, lambda: context.rank, check=check))
    assert list(map(str, results)) == ["ranks differ: [0, 1, 2]"] * WORLD_SIZE


def test_a_rank_that_says_nothing_is_given_up() -> None:
    def call(context: DistributedContext) -> Any:
        return "elsewhere" if context.rank == 2 else on_all_ranks(context, Topic.ROOM, lambda: None, limit_s=0.2)

    *waiting, _ = on_ranks(call)
    for told in waiting:
        assert type(told) is CommunicationError
        assert "waited to hear from all 3 ranks (room) in vain: rank 2 said nothing within 0.2 s" in str(told)


def test_who_lost_another_rank_does_not_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_limits, "LAST_WORDS_S", 0.3)

    def call(context: DistributedContext) -> Any:
        return "gone" if context.rank == 2 else failing(context.rank, PeerLostError("rank 2 is gone"))(context)

    started_s = time.monotonic()
    *lost, _ = on_ranks(call, timeout_s=60.0)
    assert time.monotonic() - started_s < 20
    assert [(type(error), str(error)) for error in lost] == [(PeerLostError, "rank 2 is gone")] * 2


def test_one_process_agrees_with_itself() -> None:
    alone = DistributedContext(0, 1, 0, 1.0)
    assert all_gather_json(alone, Topic.START, lambda: 5) == [5]
    assert on_first_rank(alone, Topic.PLANS, lambda: "x") == "x"
    with pytest.raises(ConfigError, match=r"^bad$"):
        failing(0, ConfigError("bad"))(alone)


def test_an_error_of_an_unknown_class_keeps_message_and_exit_code() -> None:
    class OwnError(SkipPipeError):
        exit_code = 7

    for content in (error_content(OwnError("odd")), {"class": "did_you_mean", "message": "odd", "exit_code": 7}):
        told = error_elsewhere(content, "node-1")
        assert type(told) is SkipPipeError
        assert (str(told), told.exit_code) == ("node-1: odd", 7)


@pytest.mark.parametrize(
    ("rank", "world_size"), [("-1", "2"), ("2", "2"), ("0", "9" * 20), ("0", "9" * 5000), ("x", "2")]
)
def test_places_that_no_rank_can_have_are_refused(rank: str, world_size: str) -> None:
    environment = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    with pytest.raises(ConfigError, match=r"ranks count from 0|must be numbers"):
        DistributedContext.from_environment(1.0, environment)
