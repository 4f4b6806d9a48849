"""Results of a benchmark as a file and as a table; the same for all of them."""

import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]
Columns = Mapping[str, Callable[[Result], str]]
"""Titles, and how the cell below is made of a result."""

MARKS = {True: "yes", False: "**no**", None: ""}
QUICK = "**A quick run, made only to see that all rows run: the bars mean nothing.**"


def merged(path: Path, result: Result, names: Sequence[str]) -> list[Result]:
    """Return the results in `path` with `result` in the place of its row, in the order of `names`."""
    known = {row["name"]: row for row in json.loads(path.read_text())} if path.exists() else {}
    known[result["name"]] = result
    return [known[name] for name in names if name in known]


def markdown(title: str, columns: Columns, results: Sequence[Result], *, script: str = "run.py", text: str = "") -> str:
    """Return the page with the table; where and when each row was measured stands below it, `text` above it."""
    lines = [f"# {title}", "", f"Made by `{script}`; see [the guide](../README.md).", "", *([text, ""] if text else [])]
    if any(result["quick"] for result in results):
        lines += [QUICK, ""]
    lines += [_line([*columns]), _line(["---"] * len(columns))]
    lines += [_line([cell(result) for cell in columns.values()]) for result in results]
    lines.append("")
    places: dict[str, list[str]] = {}
    for result in results:
        where = f"{result['cpu']}, {result['cores']} cores, commit {result['commit']}, {result['date']}"
        places.setdefault(where, []).append(result["name"])
    for where, names in places.items():
        lines.append(f"- {where}: {'all rows' if len(places) == 1 else '; '.join(names)}")
    return "\n".join(lines) + "\n"


def rows_table(rows: Sequence[Result]) -> list[str]:
    """Return the lines of a table whose titles are the keys of its rows, and below it what has `failed`."""
    titles = [title for title in rows[0] if title != "failed"]
    lines = [_line(titles), f"|{'---|' * len(titles)}"]
    lines += [_line([_cell(row[title]) for title in titles]) for row in rows]
    return [*lines, "", *(f"- {words}" for row in rows for words in row["failed"])]


def machine(repository: Path) -> Result:
    """Return the processor, the cores that this process may use, and the commit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": _cpu_model(), "cores": cores, "commit": _commit(repository)}


def number(value: float | None, unit: str) -> str:
    """Return a cell with a number, empty where there is none."""
    return "" if value is None else f"{value:.2f} {unit}"


def _cell(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, float) and 0 < value < 1e-3 else str(value)


def _cpu_model() -> str:
    table = Path("/proc/cpuinfo")
    for line in table.read_text().splitlines() if table.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit(repository: Path) -> str:
    """Return the short hash of the commit, with a plus sign where tracked files other than results differ from it."""
    hashed = _git(repository, "rev-parse", "--short", "HEAD") or "unknown"
    files = (":/", *(f":(top,exclude,glob)benchmarks/**/{name}" for name in ("results.*", "*.trace.csv")))
    return hashed + "+" if _git(repository, "status", "--porcelain", "--untracked-files=no", "--", *files) else hashed


def _git(repository: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=repository, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
