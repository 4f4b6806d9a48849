"""What is printed for people: one line an error, and nothing that a terminal would take for a command."""

import logging
import os
from typing import Final
from unicodedata import category

import click

LOG_LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
VARIABLE: Final = "SKIPPIPE_LOG_LEVEL"


def one_line(text: str) -> str:
    """Return `text` with line breaks, control characters and halves of pairs written out as in a Python string."""
    if text.isprintable():
        return text
    return "".join(repr(one)[1:-1] if category(one) in {"Cc", "Cs", "Zl", "Zp"} else one for one in text)


def set_up_logging(prefix: str) -> None:
    """Send log lines to standard error; raise `click.UsageError` where the environment asks for no known level."""
    given = os.environ.get(VARIABLE) or "INFO"
    level = given.strip().upper()
    if level not in LOG_LEVELS:
        raise click.UsageError(f"{VARIABLE} is {given!r}; give one of {', '.join(LOG_LEVELS)}")
    handler = logging.StreamHandler()
    handler.setFormatter(SafeFormatter(f"{prefix}%(levelname)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


class SafeFormatter(logging.Formatter):
    """Writes out control characters of a message."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # the base's name
        """See the base."""
        record.message = one_line(record.message)
        return super().formatMessage(record)
