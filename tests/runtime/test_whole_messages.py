"""A wait for a message ends with its connection, also where some of its bytes have come already."""

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from processes import free_port, preloaded
from torch._C._distributed_c10d import TCPStore

from skippipe.runtime.gradients.collectives import begin_broadcast
from skippipe.runtime.ranks.groups import ProcessGroups

WORLD_SIZE = 3
NUMBERS = 10_000_000
"""So many that a message of them is still coming in when its sender is found and stopped."""
PATIENCE_S = 60.0
"""Of the groups: who waits as long has not noticed anything."""


def run_rank(rank: int, port: int, pids: "torch.multiprocessing.Queue[tuple[int, int]]") -> None:
    """Send rank 0 numbers; rank 0 kills one sender in the middle of a message, and stops the other one."""
    store = TCPStore("127.0.0.1", port, WORLD_SIZE, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE)
    groups = [dist.new_group(timeout=timedelta(seconds=PATIENCE_S)) for _ in range(WORLD_SIZE)]
    pids.put((rank, os.getpid()))
    if rank:
        begin_broadcast(torch.ones(NUMBERS), groups[rank], rank)[0].wait()
        return
    process_ids = dict(pids.get() for _ in range(WORLD_SIZE))
    for sender, fault in ((1, signal.SIGKILL), (2, signal.SIGSTOP)):
        numbers = torch.zeros(NUMBERS)
        [message] = begin_broadcast(numbers, groups[sender], sender)
        while not numbers[0]:
            time.sleep(0)
        os.kill(process_ids[sender], fault)
        begun_s = time.monotonic()
        if fault is signal.SIGSTOP:
            group = groups[sender]
            ProcessGroups(rank, group, group, group, None, (rank,)).abort()
        with pytest.raises(RuntimeError):
            message.wait()
        assert time.monotonic() - begun_s < PATIENCE_S / 4
        assert not numbers[-1], "the message had come before"
    os.kill(process_ids[2], signal.SIGKILL)
    os._exit(0)  # without the others there is no orderly end


def test_a_wait_in_the_middle_of_a_message_ends_with_its_connection() -> None:
    context, port = preloaded(), free_port()
    pids = context.Queue()
    processes = [context.Process(target=run_rank, args=(rank, port, pids)) for rank in range(WORLD_SIZE)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL, -signal.SIGKILL]
