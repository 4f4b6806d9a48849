"""An error of one process as another one raises it: its class, message and exit code as JSON, nothing unpickled."""

from typing import Any

from skippipe import errors
from skippipe.errors import SkipPipeError


def error_content(error: BaseException) -> dict[str, Any]:
    """Return what others need to know of an error (JSON); one that is not ours counts as a failure at run time."""
    if isinstance(error, SkipPipeError):
        return {"class": type(error).__name__, "message": str(error), "exit_code": error.exit_code}
    return {"class": "SkipPipeError", "message": f"{type(error).__name__}: {error}", "exit_code": 1}


def error_elsewhere(content: dict[str, Any], who: str) -> SkipPipeError:
    """Return the error that `error_content` has described, with the name of the process in front.

    It has the same exit code, and the same class where `skippipe.errors` knows one of that name.
    """
    message, exit_code = f"{who}: {content['message']}", int(content["exit_code"])
    kind = getattr(errors, str(content["class"]), SkipPipeError)
    if isinstance(kind, type) and issubclass(kind, SkipPipeError) and kind.exit_code == exit_code:
        return kind(message)
    return SkipPipeError(message, exit_code=exit_code)
