"""Measures a link as a training run sees it: gloo's messages from one rank to another; all clocks are one machine's."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from skippipe.config import Experiment

SMALL_BYTES = 64
STREAM = 6
REPEATS = 5


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

    def link(self, source: int, destination: int, size_bytes: int) -> dict[str, float] | None:
        """Return, at `destination`, latency and rate from `source` to it, measured with messages of `size_bytes`.

        A small message takes the latency. In a stream of large ones, the time from the first one's arrival to the last
        one's gives the rate.
        """
        rank = dist.get_rank()
        if rank not in (source, destination):
            return None
        small_s, seconds_each = [], []
        for _ in range(REPEATS):
            sent = torch.zeros(SMALL_BYTES // 8, dtype=torch.int64)
            large = [torch.zeros(size_bytes, dtype=torch.uint8) for _ in range(STREAM)]
            if rank == source:
                sent[0] = time.monotonic_ns()
                dist.send(sent, destination)
                for work in [dist.isend(one, destination) for one in large]:
                    work.wait()
                dist.recv(sent, destination)  # the link is empty again
            else:
                dist.recv(sent, source)
                small_s.append((time.monotonic_ns() - int(sent[0])) * 1e-9)
                arrivals_s = []
                for work in [dist.irecv(one, source) for one in large]:
                    work.wait()
                    arrivals_s.append(time.monotonic())
                seconds_each.append((arrivals_s[-1] - arrivals_s[0]) / (STREAM - 1))
                dist.send(sent, source)
        if rank == source:
            return None
        return {
            "latency_ms": 1000 * statistics.median(small_s),
            "mbit_per_s": size_bytes * 8e-6 / statistics.median(seconds_each),
        }


def make(experiment: Experiment, options: dict[str, Any]) -> Probe:
    """Return this rank."""
    return Probe()
