"""The framework's branches of the exception tree of `skippipe_scheduler.errors`.

SkipPipeError
├── InputError
│   ├── ConfigError         the YAML experiment
│   ├── DataError           a corpus, tokenizer or token cache
│   └── CheckpointError     a checkpoint that cannot be read or does not fit
├── ProgramError            a plan whose program could not be proved
├── CommunicationError      a transfer failed or timed out
│   └── PeerLostError       another rank died or fell silent
│       ├── EpochEndedError the others go on with those that are left
│       ├── LeftOutError    the run went on without this process
│       ├── MinorityError   too few members reach each other to go on
│       └── NodeLostError   one that served layers at inference
├── StorageError            writing a file failed (full disk, permissions)
└── StoppedError            a signal ended a run early (exit code 75)
"""

import difflib
from collections.abc import Iterable

from skippipe_scheduler.errors import DeadlockError, InfeasibleError, InputError, PlanError, ProblemError, SkipPipeError

__all__ = [
    "CheckpointError",
    "CommunicationError",
    "ConfigError",
    "DataError",
    "DeadlockError",
    "EpochEndedError",
    "InfeasibleError",
    "InputError",
    "LeftOutError",
    "MinorityError",
    "NodeLostError",
    "PeerLostError",
    "PlanError",
    "ProblemError",
    "ProgramError",
    "SkipPipeError",
    "StoppedError",
    "StorageError",
    "did_you_mean",
]


class ConfigError(InputError):
    """The experiment's YAML or an override on the command line is wrong."""


class DataError(InputError):
    """A corpus, tokenizer or token cache is missing, empty or damaged."""


class CheckpointError(InputError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class ProgramError(SkipPipeError):
    """The instruction lists of a plan failed their proof; the message names ranks and what each waits for."""


class CommunicationError(SkipPipeError):
    """A transfer between ranks failed or timed out."""


class PeerLostError(CommunicationError):
    """Another rank died or fell silent; the message names it and what this rank was waiting for."""


class EpochEndedError(PeerLostError):
    """The membership of a run changes: what was under way is given up, and begins again with those that are left."""


class LeftOutError(PeerLostError):
    """The others have gone on without this process, which was silent for too long."""


class MinorityError(PeerLostError):
    """Too few members of the run reach each other: the others may have gone on, so these do not."""


class NodeLostError(PeerLostError):
    """A node that served layers at inference is gone, and what it kept of the text with it."""


class StorageError(SkipPipeError):
    """A file could not be written; what was complete before is still there."""


class StoppedError(SkipPipeError):
    """A signal ended a run before its last step; the same line continues it.

    Its exit code is EX_TEMPFAIL of sysexits.h: not done, not failed, to be tried again.
    """

    exit_code = 75


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the question whether the most similar of the known words was meant; nothing where none is similar."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
