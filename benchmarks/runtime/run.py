"""The benchmark of the runtime, in one command; see benchmarks/README.md.

    python benchmarks/runtime/run.py [--only ROW ...] [--quick] [--netlab FOLDER]

Every row runs in a process of its own, which starts the processes of the ranks.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import click
from rows import ROWS, Case
from table import PAGE

from common.command import chosen, folder_of_results, own_process, record
from common.table import Result

HERE = Path(__file__).resolve().parent


@click.command()
@click.option("--only", multiple=True, help="Rows whose names contain this; may be repeated.")
@click.option("--quick", is_flag=True, help="A few seconds a row; the bars then mean nothing.")
@click.option(
    "--netlab",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of netlab.sh and netlab_tun.py, for the rows on a shaped network; these are left out without it.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of results.md and results.json (default: beside run.py; with --quick, a temporary one).",
)
@click.option("--row", "row_name", hidden=True, help="Measure this row here and print it as JSON.")
def main(only: tuple[str, ...], quick: bool, netlab: Path | None, out: Path | None, row_name: str | None) -> None:
    """Measure the rows of the table; write it and print it. Rows that are not measured stay as they were."""
    case = Case(netlab, quick)
    if row_name is not None:
        click.echo(json.dumps(asdict(ROWS[row_name].measure(case))))
        return
    names = []
    for name in chosen(ROWS, only):
        reason = ROWS[name].why_not(case)
        if reason is None:
            names.append(name)
        else:
            click.echo(f"{name}: left out, {reason}", err=True)
    if names:
        record(ROWS, names, folder_of_results(out, quick, HERE), lambda name: in_own_process(name, case), PAGE)


def in_own_process(name: str, case: Case) -> Result:
    """Measure one row in a new process; a row that fails is recorded with its error."""
    command = [sys.executable, str(HERE / "run.py"), "--row", name, *["--quick"] * case.quick]
    if case.netlab is not None:
        command += ["--netlab", str(case.netlab)]
    return own_process(command, {"name": name, "bar": ROWS[name].bar, "quick": case.quick}, HERE)


if __name__ == "__main__":
    main()
