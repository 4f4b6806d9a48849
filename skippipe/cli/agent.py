"""torchrun with the exit code of its ranks: `python -m skippipe.cli.agent`, with all options of torchrun.

torchrun itself ends with 1 whatever its ranks end with, and also where a signal has stopped it. So what starts jobs
again could not tell a run that was stopped and can go on from one that failed.
"""

import signal
import sys
from collections.abc import Sequence

from skippipe.cli import early_signals
from skippipe.errors import StoppedError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run an agent; return the exit code of the rank that failed first, or that of a stop where a signal came."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.run(run.parse_args(arguments))
    except ChildFailedError as failed:
        rank, first = failed.get_first_failure()
        print(f"rank {rank} ended first, with {_in_words(first.exitcode)}; its reason is above", file=sys.stderr)
        return first.exitcode if first.exitcode > 0 else 1
    except SignalException as stopped:
        print(f"{signal.Signals(stopped.sigval).name}: the ranks of this host were stopped", file=sys.stderr)
        return StoppedError.exit_code
    return 0


def _in_words(exit_code: int) -> str:
    return f"exit code {exit_code}" if exit_code >= 0 else f"signal {-exit_code}"


if __name__ == "__main__":
    early_signals.hear(["train"])  # torchrun hears signals only once its ranks run
    sys.exit(main())
