"""Predicted against measured: TCP messages that share network cards and a site's uplink, between real hosts.

    python benchmarks/runtime/shared_uplink.py

makes five network namespaces (needs root), three of them a site with an uplink, and sends messages as the simulator's
contention "shared" knows them: one at a time on each connection, as many at once as there are. It prints when each was
predicted to be there, when it was, and by how much the durations differ.
"""

import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

sys.path.append(str(Path(__file__).resolve().parents[1]))

from common.hosts import Hosts, why_not
from skippipe_scheduler.plan.shared_links import SharedLinks
from skippipe_scheduler.problem.sharing.capacities import Duplex, SharedCapacities, Uplink

SITE = ("0", "1", "2")
OUTSIDE = ("3", "4")
CARD_MBIT_PER_S = 60.0
UP_MBIT_PER_S, DOWN_MBIT_PER_S = 80.0, 40.0
PAYLOAD = 1448 / 1514
"""Of what a shaper counts; the rest are the headers of Ethernet, IP and TCP. Acknowledgements and lost packets come on
top, so that messages take some percent longer than predicted."""
LINK_MBIT_PER_S = {("1", "3"): 15.0}
"""Links slower than all that they lead through."""
PORT = 7700
BEGIN_S = 3.0
"""Until all hosts are ready."""


@dataclass(frozen=True)
class Sent:
    """A message, and when it is sent."""

    at_s: float
    source: str
    destination: str
    megabytes: float


MESSAGES = (
    Sent(0.0, "0", "3", 24.0),
    Sent(0.0, "1", "3", 6.0),
    Sent(0.5, "2", "4", 20.0),
    Sent(1.0, "0", "1", 8.0),
    Sent(1.5, "2", "3", 10.0),
    Sent(2.0, "4", "0", 8.0),
    Sent(2.0, "3", "2", 12.0),
    Sent(4.0, "0", "3", 6.0),
    Sent(5.0, "1", "4", 10.0),
)


def predicted_s(messages: Sequence[Sent], payload: float) -> list[float]:
    """Return when each message is there, where so much of what is sent is payload."""
    cards = {node: _gbit_per_s(CARD_MBIT_PER_S, CARD_MBIT_PER_S, payload) for node in (*SITE, *OUTSIDE)}
    uplink = Uplink(name="site", nodes=SITE, gbit_per_s=_gbit_per_s(UP_MBIT_PER_S, DOWN_MBIT_PER_S, payload))
    capacities = SharedCapacities.of(cards, [uplink])
    speeds = {
        source: {
            sink: capacities.most_gbit_per_s(source, sink, LINK_MBIT_PER_S.get((source, sink), 1e6) * payload / 1000)
            for sink in cards
            if sink != source
        }
        for source in cards
    }
    links: SharedLinks[int] = SharedLinks(capacities, speeds)
    waiting = sorted(range(len(messages)), key=lambda index: messages[index].at_s)
    there_s = [0.0] * len(messages)
    for _ in range(2 * len(messages)):
        if waiting and messages[waiting[0]].at_s <= links.next_end_s:
            index = waiting.pop(0)
            sent = messages[index]
            links.offer((sent.source, sent.destination), index, sent.megabytes * 8e-3, sent.at_s)
        else:
            carried = links.carry()
            there_s[carried.content] = carried.free_s
    return there_s


def _gbit_per_s(up_mbit_per_s: float, down_mbit_per_s: float, payload: float) -> Duplex:
    return Duplex(up=up_mbit_per_s * payload / 1000, down=down_mbit_per_s * payload / 1000)


def measured_s(messages: Sequence[Sent]) -> list[float]:
    """Return when each message was there, on hosts of its own."""
    with Hosts(len(SITE) + len(OUTSIDE)) as hosts:
        hosts.part([int(host) for host in SITE])
        hosts.join_parts(UP_MBIT_PER_S, DOWN_MBIT_PER_S)
        for host in range(len(SITE) + len(OUTSIDE)):
            hosts.shape(host, CARD_MBIT_PER_S)
        begin_s = time.monotonic() + BEGIN_S
        addresses = {host: hosts.address(int(host)) for host in (*SITE, *OUTSIDE)}
        job = json.dumps({"begin_s": begin_s, "addresses": addresses, "messages": [asdict(sent) for sent in messages]})
        processes = [
            subprocess.Popen(
                [*hosts.prefix(int(host)), sys.executable, __file__, "--as-host", host, "--job", job],
                stdout=subprocess.PIPE,
                text=True,
            )
            for host in addresses
        ]
        outputs = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    return [next(output[str(index)] for output in outputs if str(index) in output) for index in range(len(messages))]


class Host:
    """One host: sends what is its own, one message at a time on each connection, and notes what arrives when."""

    def __init__(self, name: str, begin_s: float, addresses: dict[str, str], messages: Sequence[Sent]) -> None:
        self._name, self._begin_s, self._addresses, self._messages = name, begin_s, addresses, messages
        self._there_s: dict[str, float] = {}

    def run(self) -> dict[str, float]:
        """Return when each message to this host was there, by its number."""
        threads = [threading.Thread(target=self._receive, args=(source,)) for source in self._peers(to_me=True)]
        threads += [threading.Thread(target=self._send, args=(sink,)) for sink in self._peers(to_me=False)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self._there_s

    def _peers(self, *, to_me: bool) -> list[str]:
        mine = [sent for sent in self._messages if (sent.destination if to_me else sent.source) == self._name]
        return list(dict.fromkeys(sent.source if to_me else sent.destination for sent in mine))

    def _of(self, source: str, sink: str) -> list[tuple[int, Sent]]:
        numbered = enumerate(self._messages)
        return [(index, sent) for index, sent in numbered if (sent.source, sent.destination) == (source, sink)]

    def _receive(self, source: str) -> None:
        with socket.create_server((self._addresses[self._name], PORT + int(source))) as server:
            connection, _ = server.accept()
        with connection:
            for index, sent in self._of(source, self._name):
                left = int(sent.megabytes * 1e6)
                while left:
                    left -= len(connection.recv(min(left, 65536)))
                self._there_s[str(index)] = time.monotonic() - self._begin_s

    def _send(self, sink: str) -> None:
        connection = self._connect(sink)
        with connection:
            for _, sent in self._of(self._name, sink):
                time.sleep(max(0.0, self._begin_s + sent.at_s - time.monotonic()))
                connection.sendall(bytes(int(sent.megabytes * 1e6)))

    def _connect(self, sink: str) -> socket.socket:
        while True:
            connection = socket.socket()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
            if (self._name, sink) in LINK_MBIT_PER_S:
                pace = int(LINK_MBIT_PER_S[self._name, sink] * PAYLOAD * 1e6 / 8)
                connection.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, pace)
            try:
                connection.connect((self._addresses[sink], PORT + int(self._name)))
            except ConnectionRefusedError:
                connection.close()
                time.sleep(0.05)
            else:
                return connection


SO_MAX_PACING_RATE = 47
"""Of Linux; Python's `socket` does not name it."""


@click.command()
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--as-host", hidden=True)
@click.option("--job", hidden=True)
def main(repeats: int, as_host: str | None, job: str | None) -> None:
    """Print predicted and measured arrivals of messages that share cards and an uplink."""
    if as_host and job:
        content = json.loads(job)
        messages = [Sent(**sent) for sent in content["messages"]]
        click.echo(json.dumps(Host(as_host, content["begin_s"], content["addresses"], messages).run()))
        return
    obstacle = why_not()
    if obstacle:
        raise click.ClickException(obstacle)
    there_s = predicted_s(MESSAGES, PAYLOAD)
    runs = [measured_s(MESSAGES) for _ in range(repeats)]
    errors = []
    for index, sent in enumerate(MESSAGES):
        median_s = statistics.median(run[index] for run in runs)
        errors.append((median_s - there_s[index]) / (there_s[index] - sent.at_s))
        click.echo(
            f"{sent.source} to {sent.destination}, {sent.megabytes:g} MB at {sent.at_s:g} s: predicted "
            f"{there_s[index]:.2f} s, measured {median_s:.2f} s ({errors[-1]:+.1%} of its time)"
        )
    last_s = statistics.median(max(run) for run in runs)
    click.echo(
        f"all: predicted {max(there_s):.2f} s, measured {last_s:.2f} s ({last_s / max(there_s) - 1:+.1%}); mean of the "
        f"messages {statistics.mean(map(abs, errors)):.1%}, worst {max(map(abs, errors)):.1%}"
    )


if __name__ == "__main__":
    main()
