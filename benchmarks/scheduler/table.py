"""Results as a file and as a table."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]
_COLUMNS = ("row", "bar", "measured", "met", "bound", "time limit", "wall", "peak memory", "seed", "note")
_MARKS = {True: "yes", False: "**no**", None: ""}


def merged(path: Path, result: Result, names: Sequence[str]) -> list[Result]:
    """Return the results in `path` with `result` in the place of its row, in the order of `names`."""
    known = {one["name"]: one for one in json.loads(path.read_text())} if path.exists() else {}
    known[result["name"]] = result
    return [known[name] for name in names if name in known]


def markdown(results: Sequence[Result]) -> str:
    """Return the page with the table; where and when each row was measured stands below it."""
    lines = ["# Results of the planner's benchmark", "", "Made by `run.py`; see [the guide](../README.md).", ""]
    if any(result["quick"] for result in results):
        lines += ["**A quick run: the time limits are cut to seconds, the bars mean nothing.**", ""]
    lines += [_line(_COLUMNS), _line(["---"] * len(_COLUMNS)), *(_line(_cells(result)) for result in results), ""]
    places: dict[str, list[str]] = {}
    for result in results:
        where = f"{result['cpu']}, {result['cores']} cores, commit {result['commit']}, {result['date']}"
        places.setdefault(where, []).append(result["name"])
    for where, names in places.items():
        lines.append(f"- {where}: {'all rows' if len(places) == 1 else '; '.join(names)}")
    return "\n".join(lines) + "\n"


def machine(repository: Path) -> Result:
    """Return the processor, the cores that this process may use, and the commit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": _cpu_model(), "cores": cores, "commit": _commit(repository)}


def _cpu_model() -> str:
    table = Path("/proc/cpuinfo")
    for line in table.read_text().splitlines() if table.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit(repository: Path) -> str:
    """Return the short hash of the commit, with a plus sign where tracked files differ from it."""
    hashed = _git(repository, "rev-parse", "--short", "HEAD") or "unknown"
    return hashed + "+" if _git(repository, "status", "--porcelain", "--untracked-files=no") else hashed


def _git(repository: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=repository, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _cells(result: Result) -> list[str]:
    if "error" in result:
        return [result["name"], result["bar"], result["error"], _MARKS[False], *[""] * (len(_COLUMNS) - 4)]
    unit = result["unit"]
    return [
        result["name"],
        result["bar"],
        f"{result['value']:.2f} {unit}",
        _MARKS[result["met"]],
        _number(result["bound_s"], "s"),
        f"{result['time_limit_s']:g} s",
        _number(result["wall_s"], "s"),
        _number(result["peak_gib"], "GiB"),
        str(result["seed"]),
        result["note"],
    ]


def _number(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.2f} {unit}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
