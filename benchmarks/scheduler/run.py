"""The benchmark of the planner, in one command; see benchmarks/README.md.

    python benchmarks/scheduler/run.py --data FOLDER [--only NAME ...] [--quick]

Every row runs in a process of its own, so that its time and memory are its own.
"""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import click
from case import Case, peak_memory_gib
from instances import LARGE_QUICK, TINY, synthetic_problem
from rows import QUICK_S, ROWS
from table import PAGE

from common.command import chosen, folder_of_results, own_process, record
from common.table import Result
from skippipe_scheduler.solver.solve import SolveOptions, solve

HERE = Path(__file__).resolve().parent


@click.command()
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--only", multiple=True, help="Rows whose names contain this; may be repeated.")
@click.option("--quick", is_flag=True, help="A few seconds a row; the bars then mean nothing.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of results.md and results.json (default: beside run.py; with --quick, a temporary one).",
)
@click.option("--row", "row_name", hidden=True, help="Measure this row here and print it as JSON.")
def main(data: Path, only: tuple[str, ...], quick: bool, seed: int, out: Path | None, row_name: str | None) -> None:
    """Measure the rows of the table; write it and print it. Rows that are not measured stay as they were."""
    if row_name is not None:
        click.echo(json.dumps(measure(row_name, data, seed, quick)))
        return
    names = chosen(ROWS, only)
    if not quick:
        compile_kernel()
    record(
        ROWS,
        names,
        folder_of_results(out, quick, HERE),
        lambda name: in_own_process(name, data, seed, quick),
        PAGE,
    )


def compile_kernel() -> None:
    """Solve two small problems first, so that no row pays for compiling the planner's kernel."""
    for shape in (TINY, LARGE_QUICK):
        solve(synthetic_problem(shape, seed=0), SolveOptions(max_evaluations=100))


def measure(name: str, data: Path, seed: int, quick: bool) -> Result:
    """Measure one row in this process."""
    row = ROWS[name]
    limit_s = min(row.time_limit_s, QUICK_S) if quick else row.time_limit_s
    measured = row.measure(Case(data, limit_s, seed, quick))
    if measured.peak_gib is None:
        measured = replace(measured, peak_gib=peak_memory_gib())
    return asdict(measured) | {"time_limit_s": limit_s}


def in_own_process(name: str, data: Path, seed: int, quick: bool) -> Result:
    """Measure one row in a new process; a row that fails is recorded with its error."""
    command = [sys.executable, str(Path(__file__).resolve()), "--data", str(data), "--seed", str(seed), "--row", name]
    return own_process(
        command + ["--quick"] * quick, {"name": name, "bar": ROWS[name].bar, "seed": seed, "quick": quick}, HERE
    )


if __name__ == "__main__":
    main()
