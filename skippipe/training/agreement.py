"""What one rank cannot do, no rank does: failures that all ranks learn of at the same place."""

from collections.abc import Callable
from typing import TypeVar

from skippipe.errors import SkipPipeError
from skippipe.runtime.runner import Runner

Result = TypeVar("Result")


def together(runner: Runner, task: str, action: Callable[[], Result]) -> Result:
    """Return `action()`; where it raises a `SkipPipeError` on any rank, raise on every rank.

    All ranks call this together. Those that did not fail say that another one did, in an error with its exit code.
    """
    try:
        result = action()
    except SkipPipeError as failure:
        runner.sum_over_ranks([1, failure.exit_code])
        raise
    failed, exit_codes = runner.sum_over_ranks([0, 0])
    if failed:
        elsewhere = SkipPipeError(f"{task} failed on {failed:.0f} other rank(s); their messages say why")
        elsewhere.exit_code = round(exit_codes / failed)
        raise elsewhere
    return result
