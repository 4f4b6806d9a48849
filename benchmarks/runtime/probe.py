"""Measures a link as a training run sees it: gloo's messages from one rank to another; all clocks are one machine's."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from skippipe.config.experiment import Experiment

STREAM = 6
REPEATS = 5
IDLE_S = 0.15
"""A link rests between the messages of a pipeline, too; TCP then sends more carefully."""


class Probe:
    """One end of every link."""

    def __init__(self) -> None:
        dist.init_process_group("gloo")

    def step(self) -> None:
        """Meet all others, which opens no window but costs little."""
        dist.barrier()

    def requests(self) -> dict[str, Callable[..., Any]]:
        """Return the measurement."""
        return {"link": self.link}

    def link(self, source: int, destination: int, size_bytes: int) -> dict[str, list[float]] | None:
        """Send messages of `size_bytes` on one link; return, at both ends, when each left or arrived.

        `alone_s` are clock times of messages with a pause before each, `stream_s` of those that followed at once.
        """
        rank = dist.get_rank()
        if rank not in (source, destination):
            return None
        transfer = self._send if rank == source else self._receive
        peer = destination if rank == source else source
        for _ in range(2):  # the second time counts: connections are warm
            alone_s = [transfer(peer, 1, size_bytes)[0] for _ in range(REPEATS)]
            stream_s = transfer(peer, STREAM, size_bytes)
        return {"alone_s": alone_s, "stream_s": stream_s}

    def _send(self, destination: int, count: int, size_bytes: int) -> list[float]:
        dist.recv(torch.empty(1), destination)  # its receives are posted
        time.sleep(IDLE_S)
        left_s = time.monotonic()
        for work in [_begun(dist.isend(_message(size_bytes), destination)) for _ in range(count)]:
            work.wait()
        return [left_s] * count

    def _receive(self, source: int, count: int, size_bytes: int) -> list[float]:
        posted = [_begun(dist.irecv(_message(size_bytes), source)) for _ in range(count)]
        dist.send(torch.zeros(1), source)
        arrived_s = []
        for work in posted:
            work.wait()
            arrived_s.append(time.monotonic())
        return arrived_s


def link_costs(left: dict[str, list[float]], arrived: dict[str, list[float]], size_bytes: int) -> tuple[float, float]:
    """Return Mbit/s and milliseconds of a link from both ends' answers.

    The time between the arrivals of a stream gives the rate. What a message alone takes beyond its size at that rate is
    the latency: it holds what TCP loses at the start, too.
    """
    each_s = (arrived["stream_s"][-1] - arrived["stream_s"][0]) / (len(arrived["stream_s"]) - 1)
    alone_s = statistics.median(end - begin for begin, end in zip(left["alone_s"], arrived["alone_s"], strict=True))
    return size_bytes * 8e-6 / each_s, 1000 * max(0.0, alone_s - each_s)


def make(experiment: Experiment, options: dict[str, Any]) -> Probe:
    """Return this rank."""
    return Probe()


def _message(size_bytes: int) -> torch.Tensor:
    return torch.zeros(size_bytes, dtype=torch.uint8)


def _begun(work: dist.Work | None) -> dist.Work:
    assert work is not None, "every rank of the default group may send and receive"
    return work
