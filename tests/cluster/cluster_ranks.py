"""Processes that run the command line together, as torchrun would start them."""

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from processes import free_port

PRELOADED = [
    "torch.distributed",
    "transformers.models.llama.modeling_llama",
    "skippipe.cluster.description",
    "skippipe.planning",
]


@dataclass
class Rank:
    """One running process and where its output goes."""

    process: ForkServerProcess
    output: Path

    def finish(self, timeout_s: float = 120.0) -> tuple[int | None, str]:
        """Return exit code and output; end a process that does not stop in time."""
        self.process.join(timeout_s)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            self.process.join()
        return code, self.output.read_text()


def start_ranks(
    folder: Path, arguments: Sequence[Sequence[object]], environments: Sequence[Mapping[str, str]]
) -> list[Rank]:
    """Start `skippipe` once per entry of `arguments`, forked from a process that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = free_port()
    ranks = []
    for rank, (own, extra) in enumerate(zip(arguments, environments, strict=True)):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(len(arguments)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        output = folder / f"output-{rank}.txt"
        process = context.Process(target=run, args=([str(one) for one in own], output, environment | dict(extra)))
        process.start()
        ranks.append(Rank(process, output))
    return ranks


def run(arguments: list[str], output: Path, environment: dict[str, str]) -> None:
    """Run the command line in a new process."""
    from skippipe.cli.main import main

    os.environ.update(environment)
    with output.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        main(arguments)
