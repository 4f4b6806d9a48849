"""Streams between two ends: what the kernel counts is what goes through, and strangers stay outside."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from skippipe.cluster.description import profile_table
from skippipe.cluster.links import streams
from skippipe.cluster.links.link_rounds import MeasuredLink
from skippipe.cluster.links.link_speed import MessageTimes
from skippipe.cluster.links.streams import SEVERAL, Stream, listening, measure_streams
from skippipe.cluster.location import RankLocation
from skippipe.cluster.profile import LinkDetail, Profile
from skippipe.runtime.ranks.torch_errors import TransferError
from skippipe_scheduler.problem.cluster import Node

MEASURED_S = 0.05


def test_two_ends_measure_what_they_send(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "HELLO_S", 0.3)
    monkeypatch.setattr(streams, "START_S", 0.02)
    monkeypatch.setattr(streams, "TURN_S", 0.02)
    barrier = threading.Barrier(2)

    def meet() -> None:
        barrier.wait(30)

    with listening("127.0.0.1") as own, ThreadPoolExecutor(2) as pool:
        assert own is not None
        silent = socket.create_connection((own.address.host, own.address.port))
        stranger = socket.create_connection((own.address.host, own.address.port))
        stranger.sendall(bytes(streams.HELLO.size))
        second = pool.submit(measure_streams, (1, 0), own.accept, meet, False, 9.0, MEASURED_S)
        first = pool.submit(measure_streams, (0, 1), own.address.connect, meet, True, 1e-4, MEASURED_S)
        there, back = first.result(30), second.result(30)
        assert stranger.recv(1) == b""
        stranger.close()
        silent.close()
    assert (there[:2], back[:2]) == ((0, 1), (1, 0))
    for stream in (there, back):
        assert all(rate >= 0 for rate in stream.rates)
        assert max(stream.rates) > 0.01  # of a machine's own memory
        assert 0 <= stream.resent < 1
        assert 0 < stream.round_trip_s < 1


def test_the_kernel_counts_what_has_arrived() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sender:
        receiver, _ = listener.accept()
        before = streams.Counts.of([sender])
        thread = threading.Thread(target=sender.sendall, args=(bytes(10**7),))
        thread.start()
        left = 10**7
        while left:
            left -= len(receiver.recv(2**20))
        thread.join()
        sender.shutdown(socket.SHUT_WR)
        assert receiver.recv(1) == b""
        after = streams.Counts.of([sender])
        receiver.close()
    assert 10**7 <= after.sent_bytes - before.sent_bytes <= 1.1 * 10**7
    assert after.delivered_bytes - before.delivered_bytes == pytest.approx(10**7, rel=0.02)
    assert after.gbit_per_s_since(before) > 0


def test_an_end_that_is_gone_is_named() -> None:
    with listening("127.0.0.1") as own:
        assert own is not None
        address = own.address
    with pytest.raises(TransferError, match=r"measured streams with rank 3: .*refused"):
        measure_streams((0, 3), address.connect, lambda: None, True, 1e-4, MEASURED_S)


def test_a_far_link_has_the_rate_of_its_stream() -> None:
    stream = Stream(0, 1, 0.2, 0.1, 0.4, 0.3, 0.01, 0.078)
    far = MessageTimes(0, 1, 0.04, 0.001, None, 1e-5)
    found = MeasuredLink.of(far, stream)
    assert found.latency_s == pytest.approx(0.039, rel=1e-3)
    assert found[3:5] == (0.001, 0.2)
    assert MeasuredLink.of(far, stream._replace(one_both_gbit_per_s=0.25)).gbit_per_s == 0.25
    near = far._replace(latency_s=0.0015, gbit_per_s=4.0)
    assert MeasuredLink.of(near, stream)[2:5] == (0.0015, 0.001, 4.0)
    assert MeasuredLink.of(far._replace(gbit_per_s=0.15), stream).gbit_per_s == 0.15
    assert MeasuredLink.of(far, stream._replace(one_gbit_per_s=0.0, one_both_gbit_per_s=0.0)).gbit_per_s > 0
    sent = [list(MeasuredLink.of(far, stream)), list(MeasuredLink.of(far._replace(gbit_per_s=1.0), None))]
    assert MeasuredLink.from_json(sent[0]).stream == stream
    assert MeasuredLink.from_json(sent[1]).stream is None


def test_the_table_has_what_several_connections_carry() -> None:
    nodes = tuple(
        Node(name=name, region=name, compute_tflop_per_s=1.5, memory_gib=2.0, peak_tflop_per_s=3.0) for name in "ab"
    )
    places = tuple(RankLocation(name, name, name, name, None, None) for name in "ab")
    details = (LinkDetail("a", "b", 40.0, 1.25, Stream(0, 1, 0.2, 0.1, 0.4, 0.3, 0.015, 0.08)),)
    table = profile_table(Profile(nodes, (), 0.0, places, ("CPU",) * 2, details=details))
    (row,) = [line.split() for line in table.splitlines() if "->" in line]
    assert row == ["a", "->", "b", "1.2", "ms", "0.2", "0.1", "0.4", "0.3", "1.5%"]
    assert f"{SEVERAL} at once" in table
