"""Connections between processes that serve: frames come as they were sent, strangers are turned away."""

import contextlib
import socket
from collections.abc import Iterator

import pytest
import torch

from skippipe.inference.distributed.connections import Connections, Endpoint
from skippipe.membership.addresses import own_address


@pytest.fixture
def unconnected() -> Iterator[tuple[Connections, Connections]]:
    links = Connections(0, "127.0.0.1", 5.0), Connections(1, "127.0.0.1", 5.0)
    yield links
    for link in links:
        link.close()


@pytest.fixture
def doors(unconnected: tuple[Connections, Connections]) -> list[Endpoint]:
    return [link.listen() for link in unconnected]


@pytest.fixture
def pair(unconnected: tuple[Connections, Connections], doors: list[Endpoint]) -> tuple[Connections, Connections]:
    for link in unconnected:
        link.know(doors)
    return unconnected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frames_of_any_length_arrive_in_order(pair: tuple[Connections, Connections], dtype: torch.dtype) -> None:
    first, second = pair
    numbers = torch.randn(3, 100_000).to(dtype)[:, ::2]
    first.send(1, {"pass": 1}, {"hidden": numbers, "mask": torch.tensor([[True, False]])})
    first.send(1, {"end": 0})
    received, ended = second.receive(5.0), second.receive(5.0)
    assert received is not None
    assert received[1] is not None
    assert (received[0], received[1].header) == (0, {"pass": 1})
    assert torch.equal(received[1].tensors["hidden"], numbers)
    assert received[1].tensors["mask"].tolist() == [[True, False]]
    assert ended == (0, ({"end": 0}, {}))


def test_answers_go_back_on_the_same_connection(pair: tuple[Connections, Connections]) -> None:
    first, second = pair
    first.send(1, {"here": True})
    assert second.receive(5.0) is not None
    second.send(0, {"ready": True})
    assert first.receive(5.0) == (1, ({"ready": True}, {}))
    assert first.receive(0.0) is None


def test_the_end_of_a_connection_is_told_and_a_closed_door_is_an_error(pair: tuple[Connections, Connections]) -> None:
    first, second = pair
    first.send(1, {"here": True})
    assert second.receive(5.0) is not None
    second.close()
    assert first.receive(5.0) == (1, None)
    with pytest.raises(OSError, match="refused"):
        first.send(1, {"here": True})


@pytest.mark.parametrize("hello", [b"", b"x" * 40, b"GET / HTTP/1.1\r\nHost: somebody.example\r\n\r\n"])
def test_who_does_not_know_the_token_is_turned_away(
    pair: tuple[Connections, Connections], doors: list[Endpoint], hello: bytes
) -> None:
    first, second = pair
    refused = contextlib.suppress(OSError)  # the other side may hang up before all is said
    with refused, socket.create_connection(doors[1][:2], timeout=5.0) as stranger:
        stranger.sendall(hello)
        stranger.shutdown(socket.SHUT_WR)
        assert stranger.recv(1) == b""
    first.know([doors[0], doors[1]._replace(token="0" * 32)])
    with contextlib.suppress(BrokenPipeError):
        first.send(1, {"here": True})
    assert first.receive(5.0) == (1, None)
    assert second.receive(0.0) is None


def test_what_is_no_frame_ends_the_connection(pair: tuple[Connections, Connections]) -> None:
    first, second = pair
    first.send(1, {"here": True})
    assert second.receive(5.0) is not None
    first._peers[1].connection.send_bytes(b"\x80\x04cos\nsystem\n")
    assert second.receive(5.0) == (0, None)


def test_address_is_that_on_the_way_to_the_master_or_of_the_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert own_address("127.0.0.1", 29500) == "127.0.0.1"
    assert own_address("::1", 29500) == "::1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert own_address("192.0.2.1", 29500) == "127.0.0.1"
