"""What joins hosts by shaped lines: a process that carries packets between their tun devices. Standard library alone.

    python relay.py JSON

The JSON has the descriptors of the devices, the hosts' lines, and the paths between them (`lines.py` starts it). A
packet passes what its host sends by, the path to the other host, and what that one receives by: each has a rate and a
queue, from whose end packets are dropped. Then it is under way for the path's latency.
"""

import heapq
import json
import os
import random
import select
import sys
import time
from contextlib import suppress
from typing import Any

MOST_BYTES = 65_600
BATCH = 64
"""Packets that are read from one device before the others have their turn."""
SPIN_S = 3e-4
"""A wait so short is not slept: waking up would take as long."""
ENDS = slice(12, 20)
"""Of an IPv4 header: where the packet is from, and to where."""


class Pipe:
    """Something with a rate and a queue in front of it; `None` carries any amount."""

    def __init__(self, mbit_per_s: float | None, queue_s: float) -> None:
        self._byte_s = 0.0 if mbit_per_s is None else 8e-6 / mbit_per_s
        self._queue_s = queue_s
        self._free_s = 0.0

    def leaves_s(self, size_bytes: int, there_s: float) -> float | None:
        """Return when a packet that is there at a time has passed; None where the queue is full."""
        begin_s = max(there_s, self._free_s)
        if begin_s - there_s > self._queue_s:
            return None
        self._free_s = begin_s + size_bytes * self._byte_s
        return self._free_s


class Path:
    """The way from one host to another."""

    def __init__(self, pipes: list[Pipe], latency_s: float, jitter_s: float, loss: float) -> None:
        self._pipes, self._latency_s, self._jitter_s, self._loss = pipes, latency_s, jitter_s, loss
        self._last_s = 0.0

    def arrives_s(self, size_bytes: int, now_s: float) -> float | None:
        """Return when a packet that is sent now is there; None where it is lost. None overtakes another."""
        found: float | None = now_s
        for pipe in self._pipes:
            found = pipe.leaves_s(size_bytes, found)
            if found is None:
                return None
        if random.random() < self._loss:
            return None
        self._last_s = max(self._last_s, found + self._latency_s + random.random() * self._jitter_s)
        return self._last_s


def carry(devices: list[int], paths: dict[bytes, tuple[int, Path]]) -> None:
    """Carry packets until the process that started this one is gone: standard input ends."""
    under_way: list[tuple[float, int, int, bytes]] = []
    number = 0
    stop = sys.stdin.fileno()
    watched = [*devices, stop]
    while True:
        wait_s = under_way[0][0] - time.perf_counter() if under_way else 1.0
        readable, _, _ = select.select(watched, [], [], wait_s if wait_s > SPIN_S else 0.0)
        if stop in readable:
            return
        for device in readable:
            with suppress(BlockingIOError):
                for _ in range(BATCH):
                    packet = os.read(device, MOST_BYTES)
                    found = paths.get(packet[ENDS])
                    if found is None:
                        continue
                    destination, path = found
                    arrives_s = path.arrives_s(len(packet), time.perf_counter())
                    if arrives_s is not None:
                        number += 1
                        heapq.heappush(under_way, (arrives_s, number, destination, packet))
        now_s = time.perf_counter()
        while under_way and under_way[0][0] <= now_s:
            _, _, destination, packet = heapq.heappop(under_way)
            with suppress(OSError):
                os.write(destination, packet)


def main(job: dict[str, Any]) -> None:
    """Build the pipes and carry; with the right to do so, before all other processes of the machine."""
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    queue_s = job["queue_s"]
    up = [Pipe(line["up"], queue_s) for line in job["lines"]]
    down = [Pipe(line["down"], queue_s) for line in job["lines"]]
    paths = {}
    for entry in job["paths"]:
        source, destination = entry["source"], entry["destination"]
        pipes = [up[source], Pipe(entry["mbit_per_s"], queue_s), down[destination]]
        ends = bytes(entry["ends"])
        path = Path(pipes, entry["latency_ms"] / 1e3, entry["jitter_ms"] / 1e3, entry["loss"])
        paths[ends] = job["devices"][destination], path
    carry(job["devices"], paths)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
