"""Ranks on this machine as torchrun starts them, but forked from one process that has imported everything.

Seven ranks that import torch and transformers keep a small machine busy for longer than the rest of the demo's start.
"""

import logging
import multiprocessing
import os
import runpy
import sys
from collections.abc import Sequence
from typing import Literal

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from skippipe.errors import SkipPipeError

PRELOADED = (
    "safetensors.torch",
    "transformers.models.llama.modeling_llama",
    "skippipe.runtime.distributed_runner",
    "skippipe.training.loop",
    "skippipe.planning.sharing",
)


StartMethod = Literal["forkserver", "fork"]


def run_ranks(arguments: Sequence[str], num_ranks: int, start_method: StartMethod = "forkserver") -> None:
    """Run the command line with `arguments` on ranks 0 to num_ranks - 1 and wait for all.

    With `fork` they are copies of this process, which should then have one thread and have imported what they need.

    The agent of torchrun watches them: where one fails, the others are ended. Raises `SkipPipeError` then, and
    `KeyboardInterrupt` where a signal has ended them all.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOADED))
    agent = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id="ranks",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method=start_method,
    )
    try:
        elastic_launch(agent, run_command)(list(arguments))
    except SignalException:
        raise KeyboardInterrupt from None
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        raise SkipPipeError(
            f"{' '.join(arguments)}: rank {rank} ended with exit code {failure.exitcode}; see above for the reason"
        ) from None


def run_command(arguments: Sequence[str]) -> None:
    """Do what `python -m skippipe` does; return where it succeeds, exit with its code where it does not."""
    sys.argv = ["skippipe", *arguments]
    sys.modules.pop("skippipe.__main__", None)  # the command has imported it, and runpy would warn of that
    try:
        runpy.run_module("skippipe", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
