"""`skippipe report`: one self-contained HTML page about a run, or about several."""

from pathlib import Path

import click

from skippipe.cli.user_path import UserPath

FILE = UserPath()


@click.command("report")
@click.argument("paths", metavar="RUN ...", nargs=-1, required=True, type=FILE)
@click.option("--out", type=FILE, help="HTML page to write; RUN/report.html where not given.")
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
