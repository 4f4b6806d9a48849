"""`skippipe demo`: the whole job on an embedded default."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from skippipe.cli.user_path import UserPath

if TYPE_CHECKING:
    from skippipe.cli.demo.job import DemoResult


@click.command("demo")
@click.option(
    "--out",
    type=UserPath(file_okay=False),
    default=Path("runs/demo"),
    show_default=True,
    help="Folder for both runs and the report.",
)
@click.argument("overrides", nargs=-1)
def command(out: Path, overrides: tuple[str, ...]) -> None:
    """Plan, train with and without skipping on emulated links, evaluate at reduced depth, write report.html.

    OVERRIDES (key.sub=value) apply to both runs, for example training.max_steps=40.
    """
    from skippipe.cli.demo.job import run_demo
    from skippipe.monitor.terminal import say

    result = run_demo(out, overrides, announce=lambda text: click.echo(text, err=True))
    say(demo_table(result))


def demo_table(result: "DemoResult") -> str:
    """Return what the demo showed as a table."""
    depths = next(iter(result.runs.values())).depths
    header = f"{'':16}{'predicted':>11}{'measured':>11}" + "".join(
        f"{f'{depth.keep:.0%} depth':>13}" for depth in depths
    )
    lines = [header]
    for name, run in result.runs.items():
        perplexities = "".join(f"{depth.perplexity:>13.3f}" for depth in run.depths)
        lines.append(f"{name:16}{run.predicted_s:>9.3f} s{run.measured_s:>9.3f} s{perplexities}")
    lines += [
        "predicted, measured: iteration time (median after warm-up); depth: perplexity on held-out text",
        f"Relative time of SkipPipe: {result.relative_time:.2f} (measured iteration / full pipeline's).",
        "Half the depth costs "
        + ", ".join(f"{run.half_depth_loss:+.1%} perplexity after {name}" for name, run in result.runs.items())
        + ".",
        f"Report: {result.report}   ({result.wall_s:.0f} s in all)",
    ]
    return "\n".join(lines)
