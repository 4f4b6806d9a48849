"""Processes that run the command line together, as torchrun would start them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from processes import ForkedProcess, free_port, preloaded, run_skippipe


def start_ranks(
    folder: Path, arguments: Sequence[Sequence[object]], environments: Sequence[Mapping[str, str]]
) -> list[ForkedProcess]:
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
        ranks.append(ForkedProcess(process, output))
    return ranks
