"""The benchmark of the planner, in one command; see benchmarks/README.md.

    python benchmarks/scheduler/run.py --data FOLDER [--only NAME ...] [--quick]

Every row runs in a process of its own, so that its time and memory are its own.
"""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import click
from instances import LARGE_QUICK, TINY, synthetic_problem
from rows import QUICK_S, ROWS, Case, peak_memory_gib
from table import machine, markdown, merged

from skippipe_scheduler.solve import SolveOptions, solve

HERE = Path(__file__).parent
Result = dict[str, Any]


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
    names = [name for name in ROWS if not only or any(part in name for part in only)]
    if not names:
        raise click.UsageError(f"no row's name contains {' or '.join(map(repr, only))}; rows: {', '.join(ROWS)}")
    if not quick:
        compile_kernel()
    folder = out or (Path(mkdtemp()) if quick else HERE)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        click.echo(f"{name} ...", err=True)
        results = merged(folder / "results.json", in_own_process(name, data, seed, quick), list(ROWS))
        (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (folder / "results.md").write_text(markdown(results))
    click.echo((folder / "results.md").read_text())


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
    done = subprocess.run(command + ["--quick"] * quick, stdout=subprocess.PIPE, text=True, check=False)
    result: Result = {"name": name, "bar": ROWS[name].bar, "seed": seed, "quick": quick}
    result |= {"date": datetime.now(UTC).date().isoformat(), **machine(HERE)}
    if done.returncode != 0:
        return result | {"error": f"exit code {done.returncode}", "met": False}
    measured: Result = json.loads(done.stdout.splitlines()[-1])
    return result | measured


if __name__ == "__main__":
    main()
