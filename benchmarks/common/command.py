"""What the commands of all benchmarks do: choose rows, measure each in a process of its own, keep the table."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import mkdtemp

import click

from common.table import Columns, Result, machine, markdown, merged


def chosen(names: Iterable[str], only: Sequence[str]) -> list[str]:
    """Return the rows whose names contain one of `only`, all where it is empty; none is a usage error."""
    known = list(names)
    found = [name for name in known if not only or any(part in name for part in only)]
    if not found:
        raise click.UsageError(f"no row's name contains {' or '.join(map(repr, only))}; rows: {', '.join(known)}")
    return found


def own_process(command: Sequence[str], expected: Result, repository: Path, limit_s: float | None = None) -> Result:
    """Run `command`, whose last line is a result as JSON, in a new process; add it to what is known before.

    A row that fails is recorded with its error, and one that lasts longer than `limit_s` with what it had until then.
    A SIGTERM for this process ends that one too.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    result = expected | {"date": datetime.now(UTC).date().isoformat(), **machine(repository)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=limit_s is not None) as process:
        try:
            output, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the ranks that it has started
            output, _ = process.communicate()
            return result | _last(output) | {"error": f"ended after {limit_s:.0f} s"}
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        return result | _last(output) | {"error": f"exit code {process.returncode}", "met": False}
    return result | _last(output)


def _last(output: str) -> Result:
    """Return the last line that is a result, nothing where there is none."""
    lines = [line for line in output.splitlines() if line.startswith("{")]
    return dict(json.loads(lines[-1])) if lines else {}


def record(
    rows: Mapping[str, object],
    names: Sequence[str],
    folder: Path,
    measure: Callable[[str], Result],
    page: tuple[str, Columns],
) -> None:
    """Measure `names` one by one and write results.json and results.md in `folder` after each; print the table.

    Rows that are not measured stay as they were. `page` is the title and the columns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        click.echo(f"{name} ...", err=True)
        results = merged(folder / "results.json", measure(name), list(rows))
        write_whole(folder / "results.json", json.dumps(results, indent=1) + "\n")
        write_whole(folder / "results.md", markdown(*page, results))
    click.echo((folder / "results.md").read_text())


def write_whole(path: Path, text: str) -> None:
    """Write a file that is whole whenever this is ended."""
    aside = path.with_name(f".{path.name}")
    aside.write_text(text)
    aside.replace(path)


def folder_of_results(out: Path | None, quick: bool, beside: Path) -> Path:
    """Return `out`, else a temporary folder for a quick run, else the folder `beside` the command."""
    return out or (Path(mkdtemp()) if quick else beside)
