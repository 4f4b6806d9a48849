"""What is printed for people: one line an error, and nothing that a terminal would take for a command."""

import logging
import os
import sys
from contextlib import nullcontext
from typing import Final, TextIO

import click

LOG_LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
VARIABLE: Final = "SKIPPIPE_LOG_LEVEL"


LONGEST: Final = 2000
"""Characters of a message: more are of one word in a damaged file, and hide what is said about it."""


def one_line(text: str) -> str:
    """Return `text` with line breaks and what cannot be seen or is a command written out as in a Python string.

    The middle of a very long one is left out: the place is at its beginning, the remedy at its end.
    """
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 4 :]}"
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def set_up_logging(prefix: str) -> None:
    """Send log lines to standard error; raise `click.UsageError` where the environment asks for no known level."""
    given = os.environ.get(VARIABLE) or "INFO"
    level = given.strip().upper()
    if level not in LOG_LEVELS:
        raise click.UsageError(f"{VARIABLE} is {given!r}; give one of {', '.join(LOG_LEVELS)}")
    handler = BarHandler()
    handler.setFormatter(SafeFormatter(f"{prefix}%(levelname)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


class BarHandler(logging.StreamHandler[TextIO]):
    """Writes above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """See the base."""
        bars = sys.modules.get("tqdm")
        with nullcontext() if bars is None else bars.tqdm.external_write_mode(file=self.stream):
            super().emit(record)


class SafeFormatter(logging.Formatter):
    """Writes out control characters of a message."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # the base's name
        """See the base."""
        record.message = one_line(record.message)
        return super().formatMessage(record)
