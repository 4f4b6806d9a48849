"""`skippipe report`: one self-contained HTML page about a run, or several; `skippipe top`: a run under way."""

from pathlib import Path

import click

from skippipe.cli.user_path import OutputFile, UserPath

FILE = UserPath()


@click.command("report")
@click.argument("paths", metavar="RUN ...", nargs=-1, required=True, type=FILE)
@click.option("--out", type=OutputFile(), help="HTML page to write; RUN/report.html where not given.")
def command(paths: tuple[Path, ...], out: Path | None) -> None:
    """Write one self-contained HTML page and print its path.

    One run directory gives the page about that run, several the page that shows them beside each other. Files that
    `skippipe evaluate` wrote (RUN/evaluation.json, or those of --out) give perplexity against compute alone, all
    policies of all models in one picture.
    """
    from skippipe.monitor.report import write_depth_comparison, write_run_report, write_runs_report

    files = [path for path in paths if path.suffix == ".json"]
    if files and len(files) < len(paths):
        raise click.UsageError("give run directories, or files of `skippipe evaluate` such as RUN/evaluation.json")
    if len(paths) == 1 and not files:
        click.echo(write_run_report(paths[0], out))
        return
    if out is None:
        raise click.UsageError("say where the page about all of them goes: --out PAGE.html")
    (write_depth_comparison if files else write_runs_report)(out, paths)
    click.echo(out)


@click.command("top")
@click.argument("run_dir", metavar="RUN", type=FILE)
@click.option("--once", is_flag=True, help="Print once and end, as without a terminal.")
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(0.1, 3600),
    default=1.0,
    show_default=True,
    help="Seconds from one look to the next.",
)
def top(run_dir: Path, once: bool, interval_s: float) -> None:
    """Show a run under way: its nodes, what each does, the slowest one, links, and who has left or come.

    It reads files of the run directory and touches nothing. Ctrl-C ends the view, not the run.
    """
    from skippipe.cli.run_watch import RunWatch

    run = RunWatch(run_dir)
    if once or not run.has_terminal:
        run.print_once()
    else:
        run.watch(interval_s)
