"""`skippipe report`: one self-contained HTML page about a run."""

from pathlib import Path

import click


@click.command("report")
@click.argument("run_dir", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="HTML page to write; RUN/report.html where not given.")
def command(run_dir: Path, out: Path | None) -> None:
    """Write one self-contained HTML page about the run in directory RUN and print its path."""
    from skippipe.monitor.report import write_run_report

    click.echo(write_run_report(run_dir, out))
