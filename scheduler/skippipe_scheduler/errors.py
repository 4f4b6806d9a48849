"""The exception tree. Every error that a user can cause derives from `SkipPipeError`.

    SkipPipeError              exit code 1: failed at run time
    ├── InputError             exit code 2: bad usage or a bad input file
    │   ├── ProblemError       a cluster, workload or problem file
    │   └── PlanError          a plan file
    │       └── DeadlockError  an order in which nodes wait for each other for ever
    └── InfeasibleError        exit code 3: no plan can exist

`skippipe.errors` adds the branches of the framework.
"""

import difflib
from collections.abc import Sequence


class SkipPipeError(Exception):
    """Base of all errors whose message is meant for a person; `exit_code` is what the command line returns.

    It follows from the class; where another process failed, whose class is not known here, it is given.
    """

    exit_code: int = 1

    def __init__(self, message: object = "", *, exit_code: int | None = None) -> None:
        super().__init__(message)
        if exit_code is not None:
            self.exit_code = exit_code


class InputError(SkipPipeError):
    """Something that the user gave is wrong; the message names the place and the remedy."""

    exit_code = 2


class ProblemError(InputError):
    """A cluster, workload or problem file is wrong."""


class PlanError(InputError):
    """A plan breaks a rule or does not fit what it is used for."""


class DeadlockError(PlanError):
    """The order of a plan makes nodes wait for each other; the message names who waits for what."""


class InfeasibleError(SkipPipeError):
    """No plan obeys all the rules; the message names the rules that conflict.

    `stage` is the one whose layers do not fit the memory of a node, where that is the reason. A message that takes long
    to make may be an object whose text is asked for when it is shown.
    """

    exit_code = 3

    def __init__(self, message: object, *, stage: int | None = None) -> None:
        super().__init__(message)
        self.stage = stage


def refuse_text(values: object, what: str) -> None:
    """Raise `InputError` where `values` is one text in place of several: each of its letters would count as one."""
    if isinstance(values, str):
        raise InputError(f"{what}: {values!r} is one text; give a list of them, [{values!r}]")


def nearest(word: str, known: Sequence[str]) -> str:
    """Return 'did you mean ...?' with the entry of `known` nearest to `word`, or all of `known`."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
