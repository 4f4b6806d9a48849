"""`skippipe evaluate`: perplexity against the share of depth kept."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from skippipe.inference.evaluation import Evaluation


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
            return tuple(float(part) for part in value.replace(",", " ").split())
        except ValueError:
            self.fail(f"{value!r}: expected numbers such as 1.0 0.67 0.5", param, ctx)


class GreedyKeep(click.Command):
    """A command whose `--keep` takes all the numbers that follow it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Join the numbers after `--keep` into one argument before click reads them."""
        joined: list[str] = []
        position = 0
        while position < len(args):
            joined.append(args[position])
            position += 1
            if joined[-1] != "--keep":
                continue
            values = []
            while position < len(args) and not args[position].startswith("-"):
                values.append(args[position])
                position += 1
            joined.append(" ".join(values))
        return super().parse_args(ctx, joined)


@click.command("evaluate", cls=GreedyKeep)
@click.argument("run_dir", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--policy", "policy_name", default="random", show_default=True, help="random or full.")
@click.option("--keep", "keeps", type=FloatList(), default="1.0 0.67 0.5", show_default=True, help="Shares of stages.")
@click.option("--batches", "num_batches", type=click.IntRange(min=1), default=24, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=4, show_default=True, help="Random choices a batch.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the random choices.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def command(
    run_dir: Path,
    policy_name: str,
    keeps: tuple[float, ...],
    num_batches: int,
    repeats: int,
    seed: int,
    device: str,
    as_json: bool,
) -> None:
    """Show the perplexity of RUN's newest checkpoint with only a share of its stages, and write evaluation.json.

    Give RUN before --keep, or after `--`: --keep takes all the numbers that follow it.
    """
    from dataclasses import asdict

    from skippipe.inference.evaluation import evaluate_run

    evaluation = evaluate_run(
        run_dir,
        policy_name=policy_name,
        keeps=keeps,
        num_batches=num_batches,
        repeats=repeats,
        seed=seed,
        device=device,
    )
    click.echo(json.dumps(asdict(evaluation)) if as_json else evaluation_table(evaluation))


def evaluation_table(evaluation: "Evaluation") -> str:
    """Return perplexity by depth as a table; the last column is relative to the first row."""
    lines = [
        f"{evaluation.model}, {evaluation.checkpoint}, policy {evaluation.policy}, {evaluation.tokens:,} tokens",
        f"{'keep':>6}{'stages':>8}{'computed':>10}{'perplexity':>12}{'std':>8}{'change':>9}",
    ]
    reference = evaluation.results[0].perplexity
    for row in evaluation.results:
        lines.append(
            f"{row.keep:>6.2f}{row.kept_stages:>8}{row.share_computed:>10.1%}{row.perplexity:>12.3f}"
            f"{row.perplexity_std:>8.3f}{row.perplexity / reference - 1:>+9.1%}"
        )
    return "\n".join(lines)
