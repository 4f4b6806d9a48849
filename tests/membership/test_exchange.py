"""Contents that one process has ready for others."""

import errno
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import zmq
from member_processes import SECRET
from strangers import announce

from skippipe.checkpoint.disks.peer_files import PeerFiles
from skippipe.errors import CommunicationError, InputError
from skippipe.membership.download import PIECE_BYTES, Downloads, Source, fetch
from skippipe.membership.epoch import Member
from skippipe.membership.exchange import Exchange
from skippipe.membership.keys import run_keys
from skippipe.membership.live_run import FACTS, Contacts, find_live_run, kept_contacts

KEYS = run_keys(SECRET)


@pytest.fixture
def exchange() -> Iterator[Exchange]:
    opened = Exchange(KEYS)
    yield opened
    opened.close()


def fetched(exchange: Exchange, name: str) -> bytes | None:
    return fetch(Source("127.0.0.1", exchange.port), KEYS, name, 5.0)


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, 20 * PIECE_BYTES + 7])
def test_contents_arrive_as_they_were_offered(exchange: Exchange, size: int) -> None:
    content = random.Random(size).randbytes(size)
    exchange.offer("weights", content)
    assert fetched(exchange, "weights") == content


def test_a_socket_that_cannot_be_opened_is_an_answer_that_does_not_come(
    exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bytes:
        raise zmq.ZMQError(errno.EMFILE)

    monkeypatch.setattr(Downloads, "content", fail)
    with pytest.raises(CommunicationError, match="Too many open files"):
        exchange.fetch(Source("127.0.0.1", exchange.port), "weights", 5.0)


@pytest.mark.parametrize("size", [0, 5 * PIECE_BYTES + 7])
def test_contents_go_into_files_piece_by_piece(exchange: Exchange, tmp_path: Path, size: int) -> None:
    content, path = random.Random(size).randbytes(size), tmp_path / "weights"
    exchange.offer("weights", content)
    with closing(Exchange(KEYS)) as asking:
        files = PeerFiles(asking, (("127.0.0.1", exchange.port),), 5.0)
        files.fetch_file(0, "weights", path)
        with pytest.raises(CommunicationError, match="rank 0 has no biases"):
            files.fetch_file(0, "biases", tmp_path / "biases")
        with pytest.raises(InputError, match="not this one"):
            files.fetch_file(0, "weights", tmp_path / "other", check=refused)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def refused(_: str) -> None:
    raise InputError("not this one")


def test_a_content_is_made_once_and_gone_when_withdrawn(exchange: Exchange) -> None:
    made: list[str] = []

    def make() -> bytes:
        made.append("once")
        return b"state"

    exchange.offer_made("state", make)
    assert [fetched(exchange, "state"), fetched(exchange, "state")] == [b"state"] * 2
    assert made == ["once"]
    exchange.withdraw("state")
    assert fetched(exchange, "state") is None
    assert exchange.asked_after("state", "other")
    assert not exchange.asked_after("other", "state")
    fetched(exchange, "other")
    assert exchange.asked_after("other", "state")
    assert not exchange.asked_after("state", "state")


def test_others_are_answered_while_a_content_is_made(exchange: Exchange) -> None:
    answered = threading.Event()

    def make() -> bytes:
        return b"large" if answered.wait(60.0) else b"nobody else was answered"

    exchange.offer_made("state", make)
    exchange.offer("facts", b"small")
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(fetched, exchange, "state")
        while not exchange.asked_after("state", "facts"):
            time.sleep(0.01)
        assert fetched(exchange, "facts") == b"small"
        answered.set()
        assert coming.result(60.0) == b"large"


def test_an_exchange_fetches_without_another_thread_until_it_is_closed(exchange: Exchange) -> None:
    exchange.offer("weights", b"content")
    source = Source("127.0.0.1", exchange.port)
    with closing(Exchange(KEYS)) as asking:
        num_threads = len(os.listdir("/proc/self/task"))
        found = asking.fetch(source, "weights", 5.0, lambda: len(os.listdir("/proc/self/task")) <= num_threads)
    assert found == b"content"
    assert asking.fetch(source, "weights", 5.0) is None


def test_strangers_and_the_dead_give_no_answer(exchange: Exchange) -> None:
    exchange.offer("weights", b"secret")
    source = Source("127.0.0.1", exchange.port)
    with pytest.raises(CommunicationError, match="same secret"):
        fetch(source, run_keys("the secret of somebody else"), "weights", 0.3)


def test_a_run_is_found_by_a_member_that_answers(exchange: Exchange, tmp_path: Path) -> None:
    assert find_live_run(kept_contacts(tmp_path)) is None
    with socket.socket() as nobody:  # bound, but it does not listen
        nobody.bind(("127.0.0.1", 0))
        places = {"gone": nobody.getsockname()[1], "here": exchange.port}
        members = tuple(
            Member(name=name, host="127.0.0.1", port=1, incarnation=f"{number:032x}", data_port=port)
            for number, (name, port) in enumerate(places.items())
        )
        contacts = Contacts(secret=SECRET, members=members)
        contacts.keep(tmp_path)
        exchange.offer(FACTS, b"what it is")
        found = find_live_run(["no contacts at all", *kept_contacts(tmp_path)])
    assert found is not None
    assert ([member.name for member in found.members], found.facts) == (["here"], b"what it is")


@pytest.mark.parametrize("size", [2**19, 2**62])
def test_who_announces_a_huge_question_is_cut_off(exchange: Exchange, size: int) -> None:
    exchange.offer("weights", b"content")
    announce(exchange.port, size)
    assert fetched(exchange, "weights") == b"content"
