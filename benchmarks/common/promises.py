"""Rows that do something to what runs, look at what follows, and say whether that is as promised."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from common.command import record
from common.table import MARKS, Columns, Result, machine

Row = Callable[[], Result]
"""Does it, and returns what followed by title, `met`, and perhaps the `output` of the processes."""


def record_promises(
    rows: Mapping[str, Row], names: Sequence[str], folder: Path, page: tuple[str, str], *, quick: bool = False
) -> None:
    """Run the rows `names` and record them in `folder`; `page` is the title and what the names of rows are."""
    title, names_are = page
    columns: Columns = {
        names_are: lambda result: result["name"],
        "what follows": lambda result: "; ".join(f"{key}: {value}" for key, value in result["follows"].items()),
        "as promised": lambda result: MARKS[result["met"]],
    }
    record(rows, names, folder, lambda name: _measured(name, rows[name], quick=quick), (title, columns))


def unless(problem: str | None, row: Row) -> Row:
    """Return the row, or one that says for which `problem` it was not run."""
    return row if problem is None else lambda: {"not run": problem, "met": None}


def _measured(name: str, row: Row, *, quick: bool) -> Result:
    """Run one row; return what followed, and where and when."""
    known: Result = {"name": name, "quick": quick, "date": datetime.now(UTC).date().isoformat()}
    found = row()
    met, output = found.pop("met"), found.pop("output", None)
    result = known | machine(Path(__file__).parent) | {"follows": found, "met": met}
    return result | ({"output": output} if output else {})
