"""The `skippipe` command. Commands live in files of their own and are imported only when they are called."""

import gc
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from skippipe import __version__
from skippipe.cli import early_signals
from skippipe.cli.safe_output import one_line, set_up_logging
from skippipe.errors import InputError, SkipPipeError

COMMANDS = {
    "demo": "Run the whole job on an embedded default and write a report.",
    "init": "Write example experiments, clusters and launch templates into a folder.",
    "plan": "Solve placement, routes and order; write a plan file.",
    "simulate": "Replay a plan exactly.",
    "profile": "Measure nodes and links (under torchrun); write a cluster file.",
    "vpn": "Write WireGuard configurations for the hosts of a cluster.",
    "train": "Train a model along a plan (under torchrun, or in one process).",
    "join": "Come into a run, about to start or under way, as one of its nodes.",
    "evaluate": "Perplexity against the share of depth kept.",
    "generate": "Text from a model of which a part runs.",
    "import": "Make a run of a pretrained model, to evaluate it or to train on.",
    "export": "Write a checkpoint in the Hugging Face format.",
    "collect": "Bring a run of hosts that share no disk to one of them.",
    "top": "Show a run under way: nodes, memory, links, and who is in it.",
    "report": "Write one self-contained HTML page about a run, or several.",
    "config": "Say what every key of an experiment or another file means.",
    "validate": "Check config, cluster, problem and plan files without running them.",
}

BESIDE = {"join": "train", "collect": "export", "vpn": "init", "top": "report"}
"""Commands that live in the file of another one."""


FULL_COLLECTION_INTERVAL = 1000
"""After how many collections of less old objects Python may look through all of them for cycles that nobody holds; its
own value is 10. torch and transformers make a million objects that stay: Python looked through them seven times at the
start, for 1.3 s in every process (CPython 3.11), and later for 0.3 s, in which all others waited for this process."""


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports one when it runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order in which a user meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"skippipe.cli.commands.{BESIDE.get(cmd_name, cmd_name)}_command")
        command: click.Command = getattr(module, cmd_name if cmd_name in BESIDE else "command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands with their one-line help, without importing any of them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="skippipe")
def skippipe() -> None:
    """Train language models over slow and uneven networks, every microbatch on a route of its own.

    Exit codes: 0 done, 1 failed at run time, 2 bad usage or bad input file, 3 no feasible plan, 75 a training that a
    signal stopped early.
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit; errors meant for people are one line, never a traceback."""
    rank = os.environ.get("RANK")
    gc.set_threshold(*gc.get_threshold()[:2], FULL_COLLECTION_INTERVAL)
    code = _exit_code(arguments, f"[rank {rank}] " if rank is not None else "")
    if arguments is None:  # this process ends now, and how is decided
        gc.freeze()  # or Python looks through all that torch has made for what could be freed, for a second
        early_signals.end_with(code if isinstance(code, int) else int(code is not None))
    sys.exit(code)


def _exit_code(arguments: Sequence[str] | None, prefix: str) -> int | str | None:
    """Run the command line; return what the process ends with."""
    early_signals.leave_interrupts()
    try:
        set_up_logging(prefix)
        skippipe.main(args=arguments, prog_name="skippipe", standalone_mode=False)
    except SystemExit as stop:
        return stop.code
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo(f"{prefix}skippipe: interrupted", err=True)
        return 130
    except SkipPipeError as error:
        click.echo(f"{prefix}skippipe: error: {one_line(str(error))}", err=True)
        return error.exit_code
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package in ("", "skippipe", "skippipe_scheduler"):
            raise
        click.echo(
            f"{prefix}skippipe: error: the Python package {package!r} is not installed here; pip install {package}",
            err=True,
        )
        return InputError.exit_code
    return 0
