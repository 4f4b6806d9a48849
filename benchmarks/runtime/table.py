"""The columns of the runtime's table."""

from common.table import MARKS, Columns, Result


def _figures(result: Result) -> str:
    if "error" in result:
        return str(result["error"])
    return "; ".join(f"{one['value']:.2f} {one['unit']} {one['label']}".strip() for one in result["figures"])


def _spread(result: Result) -> str:
    quartiles = [one["quartiles"] for one in result.get("figures", ())]
    return "; ".join(f"{one[0]:.2f} to {one[1]:.2f}" for one in quartiles if one)


COLUMNS: Columns = {
    "row": lambda result: result["name"],
    "bar": lambda result: result["bar"],
    "measured (median)": _figures,
    "quartiles": _spread,
    "met": lambda result: MARKS[result["met"]],
    "note": lambda result: result.get("note", ""),
}
PAGE = ("Results of the runtime's benchmark", COLUMNS)
