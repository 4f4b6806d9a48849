"""Values on the command line: paths, in which `~` and variables stand for what they mean, and addresses.

`--out=~/plan.json --listen=10.0.0.1:40000`
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from skippipe.config.places import expanded
from skippipe.errors import ConfigError

if TYPE_CHECKING:
    from skippipe.membership.addresses import Place

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


class OutputFile(UserPath):
    """A file that the command writes at its end; where that cannot be, it is said at once."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check what can be checked without writing."""
        path: Path = super().convert(value, param, ctx)
        if path.is_dir():
            self.fail(f"{path} is a folder; name a file in it", param, ctx)
        present = next(parent for parent in path.absolute().parents if parent.exists())
        if not os.access(present, os.W_OK | os.X_OK):
            self.fail(f"{path} cannot be written: {present} is closed to this user; name another place", param, ctx)
        return path


class HostPort(click.ParamType["Place"]):
    """An address and a port of it."""

    name = "host:port"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> "Place":
        """Return what the text names."""
        from skippipe.membership.addresses import Place

        place = value if isinstance(value, Place) else Place.of(value)
        return self.fail(f"{value!r} is not HOST:PORT", param, ctx) if place is None else place
