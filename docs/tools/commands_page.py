"""The page that lists every command with its arguments and options, from what click knows of them."""

import inspect
from typing import Any, Final

import click

from skippipe.cli.main import COMMANDS, skippipe

NOUNS: Final[dict[type[click.ParamType[Any]], str]] = {
    click.IntRange: "whole number",
    type(click.INT): "whole number",
    click.FloatRange: "number",
    type(click.FLOAT): "number",
    type(click.STRING): "text",
    click.Path: "path",
}
INTRODUCTION = """# Commands

`skippipe COMMAND --help` shows the same. `python -m skippipe COMMAND` is the same program; under `torchrun` it is
`torchrun ... -m skippipe COMMAND`.

- Exit codes: 0 done, 1 failed at run time, 2 bad usage or bad input file, 3 no feasible plan, 75 a training that a
  signal stopped early. One line on standard error says what is wrong, where, and what would be right.
- With `--json` a command prints one JSON object on standard output and nothing else there; progress and logs go to
  standard error.
- `OVERRIDES` are `key.sub=value` for any [key of the experiment](configuration.md).

| command | what it does |
|---|---|
"""


def commands_page() -> str:
    """Return the whole page."""
    context = click.Context(skippipe, info_name="skippipe")
    rows = [f"| [{name}](#skippipe-{name}) | {about} |\n" for name, about in COMMANDS.items()]
    return INTRODUCTION + "".join(rows) + "".join(_command(name, context) for name in COMMANDS)


def _command(name: str, parent: click.Context) -> str:
    command = skippipe.get_command(parent, name)
    assert command is not None, name
    context = click.Context(command, info_name=name, parent=parent)
    usage = " ".join(command.collect_usage_pieces(context))
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    lines = [
        f"\n## skippipe {name}\n",
        f"```text\nskippipe {name} {usage}\n```\n",
        inspect.cleandoc(command.help or ""),
    ]
    if options:
        lines += ["\n| option | value | default | meaning |", "|---|---|---|---|"]
        lines += [_row(option, name) for option in options]
    return "\n".join(lines) + "\n"


def _row(option: click.Option, name: str) -> str:
    assert option.help, f"{name} {option.opts[0]} needs a help text"
    names = ", ".join(f"`{spelled}`" for spelled in (*option.opts, *option.secondary_opts))
    more = "; may be repeated" if option.multiple else ""
    cells = (names, _value(option) + more, _default(option), option.help)
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _value(option: click.Option) -> str:
    """Return what follows the option, in words."""
    if option.is_flag:
        return ""
    if option.metavar:
        return f"`{option.metavar}`"
    if isinstance(option.type, click.Choice):
        return " or ".join(f"`{choice}`" for choice in option.type.choices)
    noun = NOUNS.get(type(option.type), option.type.name)
    if isinstance(option.type, click.IntRange | click.FloatRange):
        limits = {"from": option.type.min, "to": option.type.max}
        said = " ".join(f"{word} {limit:g}" for word, limit in limits.items() if limit is not None)
        return f"{noun} ({said})"
    return noun


def _default(option: click.Option) -> str:
    if option.required:
        return "has to be given"
    default = option.to_info_dict()["default"]
    return "" if option.is_flag or option.multiple or default in (None, "", ()) else f"`{default}`"
