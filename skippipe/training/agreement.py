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
    failure: SkipPipeError | None = None
    result: Result | None = None
    try:
        result = action()
    except SkipPipeError as error:
        failure = error
    failed, exit_codes = runner.sum_over_ranks([failure is not None, failure.exit_code if failure else 0])
    if failure is not None:
        raise failure
    if failed:
        error = SkipPipeError(f"{task} failed on {failed:.0f} other rank(s); see the message of the first of them")
        error.exit_code = round(exit_codes / failed)
        raise error
    return result  # type: ignore[return-value]  # no failure, so there is a result
