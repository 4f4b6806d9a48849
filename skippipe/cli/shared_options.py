"""What the commands of inference share; options that take all the words after them: `--keep 1.0 0.67 0.5`."""

from collections.abc import Sequence
from typing import ClassVar

import click

from skippipe.inference.policies.registry import OWN, describe_policies

POLICIES = f"What runs: {', '.join(entry.usage for entry in OWN)}, or one of your own."
DEVICE = "What to compute on; auto: a GPU where there is one."
ABSENT = "A node of the plan that is gone; stages that it alone holds are left out. May be repeated."


def node_names(values: Sequence[str]) -> list[str]:
    """Return the names in `--absent NODE,NODE --absent NODE`."""
    return [name for value in values for name in value.split(",") if name]


class WordList(click.ParamType[tuple[str, ...]]):
    """Words after one option, separated by spaces."""

    name = "name ..."

    def convert(
        self, value: str | tuple[str, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """Split the text into words."""
        if isinstance(value, tuple):
            return value
        return tuple(value.split()) or self.fail("expected at least one word after it", param, ctx)


class FloatList(click.ParamType[tuple[float, ...]]):
    """Numbers after one option: `--keep 1.0 0.67 0.5` (also with commas)."""

    name = "share ..."

    def convert(
        self, value: str | tuple[float, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """Turn the text into numbers."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(float(part) for part in value.replace(",", " ").split())
        except ValueError:
            numbers = ()
        return numbers or self.fail(f"{value!r}: expected numbers such as 1.0 0.67 0.5", param, ctx)


class PolicyCommand(click.Command):
    """A command whose help lists all policies that there are, those of installed packages too."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what runs under each."""
        with formatter.section("Policies"):
            formatter.write_dl(list(describe_policies().items()))


class GreedyCommand(PolicyCommand):
    """A command some of whose options, such as `--keep` and `--policy`, take all the words that follow them."""

    greedy: ClassVar[tuple[str, ...]] = ("--keep", "--policy", "--lm-eval-tasks")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Join the words after such an option into one argument before click reads them."""
        joined: list[str] = []
        position = 0
        while position < len(args):
            joined.append(args[position])
            position += 1
            if joined[-1] not in self.greedy:
                continue
            values = []
            while position < len(args) and not args[position].startswith("-"):
                values.append(args[position])
                position += 1
            joined.append(" ".join(values))
        return super().parse_args(ctx, joined)
