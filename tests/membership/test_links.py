"""Connections between members: what one sends arrives whole, in whatever parts it travels."""

import time
from collections.abc import Iterator

import pytest
from member_processes import SECRET
from strangers import announce

from skippipe.membership.epoch import Member
from skippipe.membership.keys import PART_BYTES, run_keys
from skippipe.membership.links import Links, Received
from skippipe.membership.messages import Envelope, Promise


@pytest.fixture
def pair() -> Iterator[tuple[Links, Links]]:
    links = Links(run_keys(SECRET), 5.0), Links(run_keys(SECRET), 5.0)
    yield links
    for link in links:
        link.close(last_words=False)


def member(links: Links, name: str) -> Member:
    return Member(name=name, host="127.0.0.1", port=links.port, incarnation="0" * 32)


def next_message(links: Links) -> Received:
    deadline_s = time.monotonic() + 20.0
    while time.monotonic() < deadline_s:
        for news in links.news(0.1):
            if isinstance(news, Received):
                return news
    raise AssertionError("no message came")


@pytest.mark.parametrize("length", [1, PART_BYTES, 3 * PART_BYTES])
def test_messages_of_any_length_arrive_there_and_back(pair: tuple[Links, Links], length: int) -> None:
    first, second = pair
    first.connect(member(second, "second"))
    promise = Promise(epoch=1, ballot=(1, 0), report="x" * length, silent=(), accepted=None)
    sent = Envelope(sender=member(first, "first"), message=promise)
    first.send("second", sent)
    received = next_message(second)
    assert received.envelope == sent
    second.reply(received.way_back, sent)
    assert next_message(first).envelope == sent


def test_who_announces_a_huge_message_is_cut_off(pair: tuple[Links, Links]) -> None:
    announce(pair[0].port, 2 * PART_BYTES)
