"""The clock that passes are timed with while decoding."""

import time

import torch


def now_s(device: torch.device) -> float:
    """Return seconds of the clock when a GPU has done all that was asked; on a CPU those of this thread at work.

    What other programs take of a CPU would otherwise be counted as a slow pass.
    """
    if device.type == "cpu":
        return time.thread_time()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
