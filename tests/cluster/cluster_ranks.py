"""Processes that run the command line together, as torchrun would start them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from processes import free_port, preloaded, run_skippipe


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
    context = preloaded()
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
        process = context.Process(
            target=run_skippipe, args=([str(argument) for argument in own], output, environment | dict(extra))
        )
        process.start()
        ranks.append(Rank(process, output))
    return ranks
