"""The columns of the planner's table."""

from common.table import MARKS, Columns, Result, number


def _measured(result: Result) -> str:
    return result["error"] if "error" in result else f"{result['value']:.4g} {result['unit']}"


COLUMNS: Columns = {
    "row": lambda result: result["name"],
    "bar": lambda result: result["bar"],
    "measured": _measured,
    "met": lambda result: MARKS[result["met"]],
    "bound": lambda result: number(result.get("bound_s"), "s"),
    "time limit": lambda result: f"{result['time_limit_s']:g} s" if "time_limit_s" in result else "",
    "wall": lambda result: number(result.get("wall_s"), "s"),
    "peak memory": lambda result: number(result.get("peak_gib"), "GiB"),
    "seed": lambda result: "" if "error" in result else str(result["seed"]),
    "note": lambda result: result.get("note", ""),
}
PAGE = ("Results of the planner's benchmark", COLUMNS)
