"""Connections between processes that serve: frames come as they were sent, strangers are turned away."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest
import torch
import zmq

from skippipe.inference.distributed.frame_links import Frame, FrameLinks
from skippipe.membership.epoch import Member
from skippipe.membership.keys import RunKeys, run_keys, zmq_address

KEYS = run_keys("a secret for these tests")
LIMIT_S = 20.0


@pytest.fixture
def pair() -> Iterator[tuple[FrameLinks, FrameLinks]]:
    links = FrameLinks(KEYS, 5.0), FrameLinks(KEYS, 5.0)
    yield links
    for link in links:
        link.close()


def place_of(links: FrameLinks, port: int | None = None) -> Member:
    """Return the member behind some links, at the port of something in front of it if there is one."""
    return Member(name="m", host="127.0.0.1", port=1, incarnation="0" * 32, data_port=port or links.port)


def next_frame(links: FrameLinks) -> Frame:
    deadline_s = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline_s:
        frame = links.receive(1.0)
        if frame is not None:
            return frame
    raise AssertionError("no frame came")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frames_of_any_length_arrive_in_order(pair: tuple[FrameLinks, FrameLinks], dtype: torch.dtype) -> None:
    first, second = pair
    numbers = torch.randn(3, 100_000).to(dtype)[:, ::2]
    first.send(place_of(second), {"pass": 1}, {"hidden": numbers, "mask": torch.tensor([[True, False]])})
    first.send(place_of(second), {"pass": 2})
    received = next_frame(second)
    assert received.header == {"pass": 1}
    assert torch.equal(received.tensors["hidden"], numbers)
    assert received.tensors["mask"].tolist() == [[True, False]]
    assert next_frame(second) == ({"pass": 2}, {})
    assert second.receive(0.0) is None


def test_a_wait_ends_when_another_thread_asks_for_it(pair: tuple[FrameLinks, FrameLinks]) -> None:
    waker = threading.Timer(0.05, pair[0].wake)
    waker.start()
    assert pair[0].receive() is None
    waker.join()


@pytest.mark.parametrize("keys", [None, run_keys("the secret of somebody else")], ids=["none", "others"])
def test_who_does_not_have_the_keys_is_not_heard(pair: tuple[FrameLinks, FrameLinks], keys: RunKeys | None) -> None:
    first, second = pair
    with zmq.Context() as context, socket.create_connection(("127.0.0.1", second.port)) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nHost: somebody.example\r\n\r\n")
        stranger = context.socket(zmq.DEALER) if keys is None else keys.socket(context, zmq.DEALER, server=False)
        with stranger:
            stranger.linger = 0
            stranger.connect(zmq_address("127.0.0.1", second.port))
            stranger.send_multipart([b'{"end": 0}', b""])
            assert second.receive(0.2) is None
            first.send(place_of(second), {"pass": 1})
            assert next_frame(second).header == {"pass": 1}


def test_what_is_no_frame_is_left_out(pair: tuple[FrameLinks, FrameLinks]) -> None:
    first, second = pair
    with zmq.Context() as context, KEYS.socket(context, zmq.DEALER, server=False) as member:
        member.connect(zmq_address("127.0.0.1", second.port))
        for parts in ([b"\x80\x04cos\nsystem\n"], [b"[]", b""], [b"{}", b"no tensors"], [b"{}", b"", b""]):
            member.send_multipart(parts)
            assert second.receive(LIMIT_S) is None
        first.send(place_of(second), {"pass": 1})
        assert next_frame(second).header == {"pass": 1}


def test_a_frame_that_was_lost_with_its_connection_is_sent_again(pair: tuple[FrameLinks, FrameLinks]) -> None:
    """Between the two is a router that forgets the connection and what comes over it."""
    first, second = pair
    with socket.create_server(("127.0.0.1", 0)) as server:
        router = _Router(server, second.port)
        member = place_of(second, server.getsockname()[1])
        first.send(member, {"pass": 1})
        assert next_frame(second).header == {"pass": 1}
        router.forgets.set()
        first.send(member, {"pass": 2})
        deadline_s = time.monotonic() + LIMIT_S
        while (frame := second.receive(0.02)) is None and time.monotonic() < deadline_s:
            first.receive(0.02)
        assert frame == ({"pass": 2}, {})


class _Router:
    """Takes connections one after the other to a port, until it forgets one with what it has received."""

    def __init__(self, server: socket.socket, port: int) -> None:
        self.forgets = threading.Event()
        self._server, self._port = server, port
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                inner, _ = self._server.accept()
            except OSError:
                return
            with inner, socket.create_connection(("127.0.0.1", self._port)) as outer:
                back = threading.Thread(target=_copy, args=(outer, inner), daemon=True)
                back.start()
                while content := inner.recv(65536):
                    if self.forgets.is_set():
                        self.forgets.clear()
                        break
                    outer.sendall(content)


def _copy(source: socket.socket, destination: socket.socket) -> None:
    try:
        while content := source.recv(65536):
            destination.sendall(content)
    except OSError:
        return
