"""Paths on the command line, in which `~` and variables stand for what they mean: `--out=~/plan.json`."""

import os
from pathlib import Path
from typing import Any, Final

import click

from skippipe.config.places import expanded
from skippipe.errors import ConfigError

SEED: Final = click.IntRange(min=0, max=2**32 - 1)
"""What any generator of random numbers takes."""


class UserPath(click.Path):
    """A path; `~`, `$NAME` and `${NAME}` are replaced where the shell has left them."""

    def __init__(self, *, file_okay: bool = True) -> None:
        super().__init__(path_type=Path, file_okay=file_okay)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Replace, then check as the base does."""
        if isinstance(value, str):
            try:
                value = expanded(value, param.name or "path" if param is not None else "path")
                os.lstat(value)
            except FileNotFoundError:
                pass  # whether that is right is the command's to say
            except ConfigError as reason:
                self.fail(str(reason), param, ctx)
            except (OSError, ValueError) as reason:  # too long, below a file, or none at all
                self.fail(f"{value[:200]!r} cannot be a path here ({getattr(reason, 'strerror', reason)})", param, ctx)
        return super().convert(value, param, ctx)
