"""Ranks find each other in one store, again after every restart; who is missing, and who is there twice, is named."""

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from processes import free_port
from torch._C._distributed_c10d import HashStore, Store

from skippipe.errors import CommunicationError, ConfigError, DataError, PeerLostError, SkipPipeError
from skippipe.runtime.ranks import time_limits
from skippipe.runtime.ranks.agreement import on_all_ranks
from skippipe.runtime.ranks.arrival import Seat, arrive, holds_store, open_store
from skippipe.runtime.ranks.context import DistributedContext
from skippipe.runtime.ranks.store_names import TRY, Topic, store_of_try
from skippipe.runtime.ranks.watch import Watch, say_ended

NODES = ("oslo", "rome")


def come(
    pool: ThreadPoolExecutor, store: Store, process: int, rank: int, *, node: int | None = None, limit_s: float = 10.0
) -> Future[int]:
    """Let one of two processes arrive; the future has the number of its try."""
    own = Seat(rank, rank if node is None else node, "host", process)
    return pool.submit(arrive, store, own, NODES, 2, limit_s)


def failure_of(arrival: Future[int]) -> str:
    error = arrival.exception(10)
    assert isinstance(error, ConfigError)
    return str(error)


def test_every_start_of_all_ranks_is_a_try_of_its_own() -> None:
    store = HashStore()
    with ThreadPoolExecutor(2) as pool:
        for number in range(3):
            arrivals = [come(pool, store, 10 * number + rank, rank) for rank in (0, 1)]
            assert [arrival.result(10) for arrival in arrivals] == [number] * 2


def test_who_waits_meets_a_rank_that_was_started_again_and_again() -> None:
    store = HashStore()
    with ThreadPoolExecutor(4) as pool:
        lost = come(pool, store, 1, 1, limit_s=0.0)
        assert isinstance(lost.exception(10), CommunicationError)
        again = come(pool, store, 2, 1, limit_s=0.0)
        assert isinstance(again.exception(10), CommunicationError)
        waiting = come(pool, store, 3, 0)
        time.sleep(0.05)
        arrived = come(pool, store, 4, 1)
        assert waiting.result(10) == arrived.result(10) == 2


def test_ranks_that_do_not_come_are_named() -> None:
    with pytest.raises(CommunicationError, match=r"^rank 1 of 3 waited 0 s in vain for rank 0, rank 2; see why"):
        arrive(HashStore(), Seat(1, 1, "host", 7), (), 3, 0.0)


def test_a_rank_that_runs_twice_is_named_with_both_processes() -> None:
    store = HashStore()
    with ThreadPoolExecutor(2) as pool:
        first = come(pool, store, 1, 0)
        time.sleep(0.05)
        second = come(pool, store, 2, 0, limit_s=0.5)
        told = failure_of(first)
        assert isinstance(second.exception(10), CommunicationError)
    assert "rank 0 was started twice: as process 2 on host, and as process 1 on host" in told


def test_a_node_that_is_named_twice_is_refused_by_both() -> None:
    store = HashStore()
    with ThreadPoolExecutor(2) as pool:
        arrivals = [come(pool, store, rank, rank, node=1) for rank in (0, 1)]
        for arrival in arrivals:
            assert "two processes are node 'rome': process 0 on host, and process 1 on host" in failure_of(arrival)


def test_a_store_without_a_server_names_its_address() -> None:
    values = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with pytest.raises(CommunicationError, match=f"could not reach the store at 127.0.0.1:{values['MASTER_PORT']}"):
        open_store(values, 1, 0.1)
    with pytest.raises(ConfigError, match="MASTER_PORT must be a port number from 1 to 65535, not 'x'"):
        open_store(values | {"MASTER_PORT": "x"}, 1, 0.1)


def test_the_first_rank_holds_the_store_unless_an_agent_does() -> None:
    assert holds_store({}, 0)
    assert not holds_store({"TORCHELASTIC_USE_AGENT_STORE": "True"}, 0)
    assert not holds_store({}, 1)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look and give up a hundred times as fast."""
    for name in ("WATCH_S", "LAST_WORDS_S"):
        monkeypatch.setattr(time_limits, name, getattr(time_limits, name) / 100)


def wait_for_error(watch: Watch) -> SkipPipeError:
    deadline_s = time.monotonic() + 5
    while time.monotonic() < deadline_s:
        try:
            watch.check()
        except SkipPipeError as error:
            return error
        time.sleep(0.005)
    raise AssertionError("the watch saw nothing")


def error_of(watch: Watch) -> SkipPipeError:
    error = wait_for_error(watch)
    watch.close()
    return error


class FrozenStore(HashStore):
    """A store that gives no answer, as that of a machine that is frozen."""

    released = threading.Event()

    def add(self, key: str, value: int) -> int:
        """Hang."""
        self.released.wait()
        return super().add(key, value)


class LostStore(HashStore):
    """A store whose server is gone."""

    def add(self, key: str, value: int) -> int:
        """Fail as torch's store does."""
        raise RuntimeError("Connection reset by peer")


@pytest.mark.usefixtures("quick")
def test_a_store_that_gives_no_answer_is_given_up() -> None:
    error = error_of(Watch(FrozenStore(), 0, address="host0:29500", limit_s=0.1))
    FrozenStore.released.set()
    assert "the store at host0:29500 has not answered for 0.1 s; its process or host may be frozen" in str(error)


@pytest.mark.usefixtures("quick")
def test_a_lost_store_and_a_lost_agent_end_a_rank() -> None:
    error = error_of(Watch(LostStore(), 0, address="host0:29500", limit_s=60.0))
    assert "the store at host0:29500 is gone (Connection reset by peer)" in str(error)
    error = error_of(Watch(None, 0, parent=1 << 30))
    assert f"the launcher's agent (process {1 << 30}) on this host is gone" in str(error)


@pytest.mark.usefixtures("quick")
def test_a_rank_that_is_started_again_ends_the_try() -> None:
    store = HashStore()
    watch = Watch(store, 0, limit_s=60.0)
    store.add(TRY, 1)
    assert isinstance(error_of(watch), PeerLostError)


@pytest.mark.usefixtures("quick")
def test_who_ends_by_itself_heeds_the_others_no_more_but_the_agent_still() -> None:
    store = HashStore()
    watch = Watch(store, 0, limit_s=60.0, parent=os.getppid())
    store.add(TRY, 1)
    wait_for_error(watch)
    watch.let_end()
    watch.check()
    time.sleep(0.1)
    watch.check()
    watch._parent = -1
    assert "agent (process -1)" in str(error_of(watch))


@pytest.mark.usefixtures("quick")
def test_the_others_hear_at_once_of_a_rank_that_ended_by_itself() -> None:
    store = HashStore()

    def run(rank: int) -> Exception:
        own = store_of_try(store, 0)
        context = DistributedContext(rank, 3, rank, 60.0, own, watch=Watch(store, 0, limit_s=60.0))
        try:
            with context:
                if rank == 1:
                    raise DataError("corpus: no such folder")
                on_all_ranks(context, Topic.ROOM, lambda: None)
        except Exception as error:
            return error
        raise AssertionError("no error")

    started_s = time.monotonic()
    with ThreadPoolExecutor(3) as pool:
        first, own, last = pool.map(run, range(3))
    assert time.monotonic() - started_s < 5
    assert str(own) == "corpus: no such folder"
    for told in (first, last):
        assert isinstance(told, DataError)
        assert (str(told), told.exit_code) == ("rank 1: corpus: no such folder", 2)


def test_only_the_first_end_is_told() -> None:
    store = HashStore()
    for rank in (2, 1):
        say_ended(store, rank, {"class": "DataError", "message": "gone", "exit_code": 2}, 3, stay=False)
    assert store.get("ended").startswith(b'{"rank": 2,')


@pytest.mark.usefixtures("quick")
def test_ranks_that_are_done_wait_for_each_other_before_connections_close() -> None:
    store = HashStore()
    done: list[int] = []

    def run(rank: int) -> Sequence[int]:
        context = DistributedContext(rank, 3, rank, 60.0, store_of_try(store, 0))
        time.sleep(0.05 * rank)
        done.append(rank)
        context.finish()
        return list(done)

    with ThreadPoolExecutor(3) as pool:
        assert [sorted(seen) for seen in pool.map(run, range(3))] == [[0, 1, 2]] * 3
