"""`skippipe config`: what every key of a file means."""

import shutil
import textwrap
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from skippipe.config.reference import FileKind, KeyReference

KINDS = ("experiment", "cluster", "problem", "plan")
"""Written out, so that the command's help loads no models; a test holds it to `FileKind`."""
WIDEST = 100
"""Columns beyond which a line of text is hard to read."""
EVERYTHING = ""
"""What `--explain` stands for without a key."""


@click.command("config")
@click.option(
    "--explain",
    "name",
    is_flag=False,
    flag_value=EVERYTHING,
    metavar="[KEY]",
    help="Say what KEY means, such as pipeline.skip_ratio; of a section, all its keys; without KEY, everything.",
)
@click.option(
    "--of",
    "kind",
    type=click.Choice(KINDS),
    default="experiment",
    show_default=True,
    help="Kind of file that KEY belongs to.",
)
def command(name: str | None, kind: "FileKind") -> None:
    """Show the keys of experiments, and of the other files: type, default, meaning and an example of each.

    Without --explain it lists the sections. docs/configuration.md and docs/file-keys.md hold the same.
    """
    from skippipe.config.reference import file_reference, find_key

    if name is None:
        click.echo("\n".join(overview(file_reference(kind))))
        return
    chosen = file_reference(kind) if name == EVERYTHING else [find_key(kind, name)]
    click.echo("\n\n".join(explained(key) for top in chosen for key in top.walk()))


def overview(keys: "Iterable[KeyReference]") -> Iterator[str]:
    """Yield a line for each top-level key: its name, what it means, how many keys it holds."""
    keys = list(keys)
    width = max(len(key.name) for key in keys)
    for key in keys:
        number = len([*key.walk()]) - 1
        held = f" ({number} keys)" if number else ""
        yield from textwrap.wrap(
            f"{key.name:{width}}  {_first_paragraph(key)}{held}", _columns(), subsequent_indent=" " * (width + 2)
        )


def explained(key: "KeyReference") -> str:
    """Return all that is known of one key, in some lines."""
    indent = "    "
    lines = [key.name]
    for paragraph in key.meaning.split("\n\n"):
        lines += textwrap.wrap(paragraph, _columns(), initial_indent=indent, subsequent_indent=indent)
    lines.append(f"{indent}type:    {key.type.replace('`', '')}")
    if key.required:
        lines.append(f"{indent}default: none, it has to be given")
    elif key.default is not None:
        lines.append(f"{indent}default: {key.default}")
    lines.append(f"{indent}example: {key.assignment}")
    return "\n".join(lines)


def _first_paragraph(key: "KeyReference") -> str:
    return key.meaning.partition("\n\n")[0]


def _columns() -> int:
    return min(WIDEST, shutil.get_terminal_size().columns)
